"""Slurm played by this file: copied to a folder of PATH as srun, scontrol, squeue, sinfo, sbatch, scancel. Beside it lie `nodes`
(hosts of the job), `dead` (those that answer nothing), `refuse` (programs that refuse, or `program:word`: calls with a word that
begins so), `state` (squeue's answer, a line a job; the number may be left out), `steps` (that about steps), `preempted` (when),
`waiting` (the user's jobs, and what they wait for), `up` (nodes that sinfo calls idle) and `calls` (what was asked).

srun runs one task a node here, tells it its place, passes USR2 on and answers SIGTERM by killing its tasks, as the real one does.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(sys.argv[0]).parent


def words(name: str) -> list[str]:
    path = HERE / name
    return path.read_text().split() if path.exists() else []


def main(program: str, argv: list[str]) -> int:
    with (HERE / "calls").open("a") as calls:
        calls.write(" ".join([program, *argv])[:300] + "\n")
    refused = [w.partition(":")[2] for w in words("refuse") if w.partition(":")[0] == program]
    if program != "srun" and any(word.startswith(beginning) for beginning in refused for word in ["", *argv]):
        what = "Requested node configuration is not available" if "--test-only" in argv else "Operation not permitted"
        print(f"{program}: error: {what}", file=sys.stderr)
        return 1
    if program == "squeue" and "--me" in argv:
        print((HERE / "waiting").read_text() if (HERE / "waiting").exists() else "")
    elif program == "squeue" and "--steps" in argv:
        print((HERE / "steps").read_text() if (HERE / "steps").exists() else "")
    elif program == "squeue":
        said = (HERE / "state").read_text().strip() if (HERE / "state").exists() else "RUNNING|None|(null)"
        print("\n".join(s if s[:1].isdigit() else f"{argv[argv.index('--jobs') + 1]}|{s}" for s in said.splitlines()))
    elif program == "sbatch":
        print("777")
    elif program == "scontrol" and argv[:2] == ["show", "hostnames"]:
        print("\n".join(words("nodes") if "[" in argv[2] else argv[2].split(",")))
    elif program == "scontrol" and argv[:2] == ["show", "job"]:
        print("JobId=12 StartTime=2026-01-02T00:00:00 PreemptTime=" + " ".join(words("preempted") or ["None"]))
    elif program == "sinfo":
        for host in argv[argv.index("--nodes") + 1].split(","):
            print(host, "idle" if host in words("up") else "idle*")
    elif program == "srun":
        return srun(argv)
    return 0


def srun(argv: list[str]) -> int:
    flags = [word for word in argv if word.startswith("--")][: next(n for n, w in enumerate(argv) if w[:2] != "--")]
    command, nodes = argv[len(flags) :], words("nodes")
    chosen = [h for flag in flags if flag.startswith("--nodelist=") for h in flag[11:].split(",")] or nodes
    if "srun" in words("refuse") and command[0] == "sh":
        print("srun: error: Task launch for StepId=1.0 failed on node n2: Communication connection failure")
        return 233
    if set(chosen) & set(words("dead")) and command[0] != "sh":
        print("srun: error: Unable to confirm allocation", file=sys.stderr)
        return 1
    tasks: list[subprocess.Popen] = []
    ended: list[int] = []

    def kill(*_: object) -> None:
        ended.append(1)
        for task in tasks:
            task.kill()

    def tell(*_: object) -> None:
        for task in tasks:
            with contextlib.suppress(ProcessLookupError):
                task.send_signal(signal.SIGUSR2)

    signal.signal(signal.SIGTERM, kill)
    signal.signal(signal.SIGUSR2, tell)
    for number, host in enumerate(chosen):
        env = {
            **os.environ,
            "SLURMD_NODENAME": host,
            "SLURM_NODEID": str(number),
            "SLURM_STEP_NUM_NODES": str(len(chosen)),
        }
        tasks.append(subprocess.Popen(command, env=env))
        if ended:
            kill()

    while any(task.poll() is None for task in tasks):
        time.sleep(0.01)
    return max(task.returncode if task.returncode >= 0 else 128 - task.returncode for task in tasks)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[0]).name, sys.argv[1:]))

"""A stage for the supervisor of a job: a run folder, Slurm's programs played by `slurm_stand_ins`, and ranks that do as told.

`ranks` of a stage holds for each life what its nodes do: a dict from node number (or "all") to words, done in order:
`commit=N` (a committed step N), `wait` (for USR2), `sleep` (for ever), `cause=CODE` (the exit file), `end=CODE` (the node's
report, and its exit).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.job import supervise
from launch.outside import Outside

ROOT = Path(__file__).resolve().parents[3]
RANK = """#!{python} -S
import json, os, signal, subprocess, sys, time
if "ecdit_train.cli" not in sys.argv:
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
run, life, node = {run!r}, os.environ["ECDIT_LIFE"], int(os.environ["SLURM_NODEID"])
print("node", node, os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], *sys.argv[1:], flush=True)
def report(code=None, why=""):
    facts = dict(host=os.environ["SLURMD_NODENAME"], code=code, why=why)
    open(f"{{life}}/.new-{{node}}", "w").write(json.dumps(facts))
    os.rename(f"{{life}}/.new-{{node}}", f"{{life}}/node-{{node:04d}}.json")
asked = []
signal.signal(signal.SIGUSR2, lambda *_: asked.append(1))
number = int(life[-4:])
told = json.load(open(f"{{run}}/ranks"))
told = told[min(number, len(told)) - 1]
report()
for word in (told.get(str(node)) or told.get("all")).split():
    word, _, value = word.partition("=")
    if word == "commit": os.makedirs(f"{{run}}/checkpoints/step_{{int(value):08d}}", exist_ok=True)
    if word == "sleep": time.sleep(600)
    while word == "wait" and not asked: time.sleep(0.01)
    if word == "cause": open(os.environ["ECDIT_EXIT_FILE"], "w").write(value + "\\nrank 1: because\\n")
    if word == "end":
        report(int(value), "")
        sys.exit(int(value))
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


class Clock(Outside):
    """Time that passes with listening only, ten times as fast or faster."""

    def __init__(self) -> None:
        super().__init__()
        self.time = 0.0
        self.heard: list[float] = []
        self.at_each: Callable[[], None] = lambda: None

    def now(self) -> float:
        return self.time

    def listen(self, seconds: float) -> None:
        # Short looks are at processes, which take real time, on a busy machine too; a back-off is nobody's.
        time.sleep(0.01 if seconds >= 1.0 else max(0.01, seconds / 10))
        self.time += seconds
        self.heard.append(seconds)
        self.at_each()


@dataclass(kw_only=True)
class Stage:
    """See the module."""

    folder: Path
    nodes: tuple[str, ...] = ("n1", "n2")
    clock: Clock = field(default_factory=Clock)
    environ: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.run, self.bin = self.folder / "my run", self.folder / "bin"
        self.run.mkdir()
        self.bin.mkdir()
        self.play("nodes", *self.nodes)
        body = (Path(__file__).parent / "slurm_stand_ins.py").read_text()
        for name in ("srun", "scontrol", "squeue", "sinfo", "sbatch", "scancel"):
            write(self.bin / name, f"#!{sys.executable} -S\n{body}")
        self.python = write(self.bin / "python", RANK.format(python=sys.executable, run=str(self.run)))
        (self.run / "job.sh").write_text("#!/bin/sh\n")
        names = self.nodes[0] if len(self.nodes) == 1 else "n[1-9]"
        self.environ = {
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "PYTHONPATH": str(ROOT),
            "SLURM_JOB_ID": "12",
            "SLURM_JOB_NODELIST": names,
            "SLURM_SUBMIT_DIR": str(self.folder),
        }

    def play(self, name: str, *words: str) -> None:
        """Tell the stand-ins something."""
        (self.bin / name).write_text(" ".join(words))

    def job(self, **changed: Any) -> Path:
        checks = {"gpus": 0, "free_bytes": 0, "clock_seconds": 60.0, "bandwidth": 0.0, "folders": [str(self.run)]}
        lives = {"without_progress": 3, "total": 100, "back_off": [15.0, 60.0, 240.0]}
        facts: dict[str, Any] = {
            "format": 1,
            "run": str(self.run),
            "code": None,
            "python": str(self.python),
            "srun": [],
        }
        facts |= {"nodes": len(self.nodes), "ranks_per_node": 2, "gpu": False, "words": [], "lead": 60, "lives": lives}
        facts |= {"bad_node": "exclude", "interface": None, "preflight": checks}
        path = self.run / "job.json"
        path.write_text(json.dumps(facts | changed))
        return path

    def supervise(self, *ranks: dict[Any, str], **changed: Any) -> int:
        """The job's exit code, for ranks that do this in each life."""
        (self.run / "ranks").write_text(json.dumps(ranks))
        return supervise(self.job(**changed), environ=self.environ, outside=self.clock)

    def calls(self, *beginning: str) -> list[str]:
        path = self.bin / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if line.startswith(" ".join(beginning))]

    def lines(self, what: str = "decision", *, job: str = "12") -> list[dict[str, Any]]:
        path = self.run / "jobs" / f"{job}.jsonl"
        found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [line for line in found if line["what"] == what]

    @property
    def then(self) -> list[str]:
        return [line["then"] for line in self.lines()]

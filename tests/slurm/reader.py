"""Somebody who reads a page and types its commands on the login node of the test's cluster.

What a page says of a real machine room is read as something that fits here: `FILL`. All else is typed as it stands.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from drills import LAB, Run
from tiny_runs import WORDS

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
NOT_TRIED = "  # not tried: "
"""What a line ends with that cannot be run here, and then why."""

SMALL = (
    *WORDS, "--config-dir=mylab", "moe/experts=drill", "moe.experts.pause=0.1", "train.steps=3000", "checkpoint.every_steps=20",
    "optim.schedule=constant", "watch.lease=6", "watch.grace=30", "watch.data=15", "watch.step=15",
)  # fmt: skip
FILL = {
    "train.steps=2000": "train.steps=16",
    "train.microbatch=32": "train.microbatch=2",
    "step_00001000": "step_00000012",
    "checkpoint.every_steps=500": "",
    "experiment=ec_dit_xl_8e": " ".join(SMALL),
    "cluster=h100_ib400": "cluster=local",
    "cluster=h200_ib400": "cluster=local cluster.name=other",
    "cluster.nodes=4": "cluster.nodes=2 parallel=pair",
    "cluster.nodes=2": "cluster.nodes=1 parallel=single",
    "cluster.partition=preemptible": "cluster.partition=low",
    "show partition preemptible": "show partition low",
    "--nodes=4": "--nodes=2",
    "OMP_NUM_THREADS=8": "OMP_NUM_THREADS=1",
    "--nproc 8 resume": "--nproc 2 resume",
}


def commands(text: str) -> list[str]:
    """The command lines of a page's bash blocks, those that go on in the next line as one."""
    bodies = [body for language, body in FENCE.findall(text) if language == "bash"]
    return [line for body in bodies for line in body.replace("\\\n", " ").splitlines() if line.strip()]


def is_tried(line: str) -> bool:
    return "# not tried" not in line


def unrun(text: str) -> list[str]:
    """What a page shows as a command and nobody would run: in a block of another kind, indented, or left out without a reason."""
    blocks = [body for language, body in FENCE.findall(text) if language in ("", "sh", "shell", "console")]
    programs = "ecdit|scontrol|sbatch|srun|scancel|squeue|sinfo"
    indented = re.findall(rf"^    (?:[A-Z_]+=\S+ )*(?:{programs}) .*$", FENCE.sub("", text), re.MULTILINE)
    silent = [line for line in commands(text) if not is_tried(line) and len(line.partition(NOT_TRIED)[2]) < 5]
    return [*blocks, *indented, *silent]


class Reader:
    """In a folder of their own, with `data/images`, `mylab`, a shell that knows `ecdit`, and what they have seen so far."""

    def __init__(self, run: Run, *, folder: Path) -> None:
        """`run`: the one that the pages call `runs/xl_8e`."""
        self.run, self.folder, self.job = run, folder, 0
        (folder / "data").mkdir()
        (folder / "data" / "images").symlink_to(run.shards)
        shutil.copytree(LAB, folder / "mylab", ignore=shutil.ignore_patterns("__pycache__"))
        (folder / "bin").mkdir()
        program = f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m ecdit_train.cli "$@"\n'
        (folder / "bin" / "ecdit").write_text(program)
        (folder / "bin" / "ecdit").chmod(0o755)

    def types(self, line: str) -> tuple[int, str]:
        """Exit code, and standard output and error together."""
        nodes = self.run.cluster.job(self.job).nodes if self.job else ()
        soon = f"parallel=pair --stop-after {self.run.step() + 5}"  # typed here, it would go on to the end of the run
        meant = {**FILL, "parallel=ep8": soon, "JOB": str(self.job), **({"NODE": nodes[-1]} if nodes else {})}
        said = "|".join(sorted(map(re.escape, meant), key=len, reverse=True))
        # All in one pass: what stands for a word is not read again.
        line = re.sub(rf"(?<![\w.-])(?:{said})(?![\w.-])", lambda found: meant[found[0]], line)
        shell = f"export PATH={shlex.quote(str(self.folder / 'bin'))}:$PATH; {line}"
        done: subprocess.CompletedProcess[str] = self.run.cluster.attempt("bash", "-c", shell, seconds=300)
        text = done.stdout + done.stderr
        for found in re.findall(r"^(?:Submitted batch )?job (\d+)", text, flags=re.MULTILINE):
            self.job = int(found)
        return done.returncode, text

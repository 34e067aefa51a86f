"""The job of a run as people see it: what Slurm says of it now, and what it decided."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ecdit_train.supervise import lease
from launch import record
from launch.outside import Outside
from launch.slurm import JobState, Slurm

SHOWN = 3
RECENT = 8
"""Jobs of a run that may wait in the queue; each is asked for by itself."""


@dataclass(frozen=True, kw_only=True)
class JobView:
    """The newest job of a run folder."""

    number: str
    state: JobState | None
    """None: not in the queue, or nobody here can ask."""
    lines: tuple[record.Line, ...]

    @property
    def waits(self) -> bool:
        return self.state is not None and self.state.state == "PENDING"

    @property
    def runs(self) -> bool:
        return self.state is not None and self.state.state == "RUNNING"

    def __str__(self) -> str:
        if self.state is None:
            return f"{self.number}: {'not in the queue' if shutil.which('squeue') else 'no Slurm here to ask'}"
        why = f" ({self.state.reason})" if self.state.reason not in ("None", "") else ""
        return f"{self.number}: {self.state.state}{why}"

    def decisions(self) -> list[str]:
        """The last ones, a line each."""
        return [_words(line) for line in self.lines if line.get("what") == "decision"][-SHOWN:]


def look(run: Path) -> JobView | None:
    """None where no job has written."""
    number = record.newest(run)
    if number is None:
        return None
    lines = record.read(run, number)
    if lines and lines[-1].get("what") == "resubmitted":
        number = str(lines[-1]["to"])
    state = Slurm(outside=Outside(), job=number, environ=os.environ).state() if shutil.which("squeue") else None
    return JobView(number=number, state=state, lines=tuple(lines))


def nodes_of(run: Path, *, job: str, began: float) -> int | None:
    """How many nodes a job's life had that trained from `began` (seconds since the epoch) on; None: nobody noted it."""
    before = [line for line in record.read(run, job) if line.get("what") == "life" and line.get("time", 0.0) <= began]
    return len(before[-1].get("nodes") or []) or None if before else None


def take_out(run: Path, *, but: str | None = None, say: Callable[[str], object]) -> list[str]:
    """Cancels the run's jobs that wait in the queue, all but one that somebody else asks; the numbers of those that it took out."""
    numbers = [number for number in record.jobs(run)[-RECENT:] if number != but]
    outside, out = Outside(), []
    for number in numbers if shutil.which("squeue") else ():
        job = Slurm(outside=outside, job=number, environ=os.environ)
        state = job.state()
        if state is None or state.state != "PENDING":
            continue
        ask_to_stop(run, number)  # one that starts now begins no life
        outside.call(["scancel", "--state=PENDING", number])
        now = job.state()
        if now is None or now.state in lease.ENDED - {"PENDING"}:
            record.stop_path(run, number).unlink(missing_ok=True)
            out.append(number)
            say(f"job {number} waited in the queue ({state.reason}); it is cancelled")
        elif now.state == "PENDING":
            record.stop_path(run, number).unlink(missing_ok=True)
    return out


def ask_to_stop(run: Path, number: str) -> None:
    """The supervisor starts no further life; one that has written nothing yet begins none. Raises OSError."""
    path = record.stop_path(run, number)
    path.parent.mkdir(exist_ok=True)
    path.touch()


def _words(line: record.Line) -> str:
    at = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(float(line.get("time", 0))))
    wait = f" in {line['wait']:g} s" if line.get("wait") else ""
    names = ", ".join([*line.get("lost", []), *line.get("bad", {})])
    bad = f"; bad nodes: {names}" if names else ""
    place = f"life {line.get('life', '?')}, step {line.get('step', '?')}"
    return f"{at}, {place}: {line.get('reason', '')}{bad}: {line.get('then')}{wait}"

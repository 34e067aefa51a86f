"""What a job did and decided, one JSON object a line, in RUN/jobs/<job>.jsonl: for people, and for the supervisor of the next
attempt, which counts from it.

    {"what": "submitted"}                                  by `ecdit launch`: first of all
    {"what": "begun", "attempt": 0}                        by the supervisor, first of all
    {"what": "life", "life": 3, "step": 400, ...}          a life begins; newest committed step then
    {"what": "decision", "then": "again", "code": 137, ...}  what came of it, and what happens next; "taken": Slurm took the nodes
    {"what": "resubmitted", "to": "4712"}                  the job goes on under this number
    {"what": "excluded", "nodes": ["n2"], "lost": ["n2"]}  the job must not get these nodes; lost: they do not answer
    {"what": "stuck", "step": 400, "nodes": ["n2"]}       bad or lost nodes for which there are no others, or a
                                                           warning before the first life: counts as a life
    {"what": "short", "nodes": ["n1"]}                     an attempt that was given too few nodes
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ecdit_train import atomic
from ecdit_train.run_folder import CHECKPOINTS, JOBS, METRICS, by_step
from launch.classes import STOP

Line = dict[str, Any]
MARGIN_SECONDS = 30.0
"""For the ranks to agree and leave, besides the step at work and the save."""


def path_of(run: Path, job: str) -> Path:
    return run / JOBS / f"{job}.jsonl"


def stop_path(run: Path, job: str) -> Path:
    """Made by `ecdit stop`: no further life."""
    return run / JOBS / f"{job}.stop"


def add(run: Path, job: str, **facts: Any) -> None:
    """A line more. A disk that refuses is not a reason to end a job: nothing is raised."""
    atomic.append_line(path_of(run, job), facts)


def read(run: Path, job: str) -> list[Line]:
    """All lines of a job and of those that it goes on from, oldest first. What cannot be read is left out."""
    lines, seen = atomic.read_lines(path_of(run, job)), {job}
    while (before := _before(run, job)) is not None and before not in seen:
        seen.add(before)
        lines, job = atomic.read_lines(path_of(run, before)) + lines, before
    return lines


def newest(run: Path) -> str | None:
    """The job that was submitted, or wrote, last."""
    paths = list((run / JOBS).glob("*.jsonl"))
    return max(paths, key=lambda path: (path.stat().st_mtime, path.stem)).stem if paths else None


def jobs(run: Path) -> list[str]:
    """Every job that was submitted or has written, and what they go on as; the one that wrote last comes last."""
    found = []
    for path in sorted((run / JOBS).glob("*.jsonl"), key=lambda path: (path.stat().st_mtime, path.stem)):
        found += [
            path.stem,
            *(str(line["to"]) for line in atomic.read_lines(path) if line.get("what") == "resubmitted"),
        ]
    return list(dict.fromkeys(found))


def _before(run: Path, job: str) -> str | None:
    for path in (run / JOBS).glob("*.jsonl"):
        if any(line.get("what") == "resubmitted" and str(line.get("to")) == job for line in atomic.read_lines(path)):
            return path.stem
    return None


@dataclass(frozen=True, kw_only=True)
class History:
    """The lives of a job so far."""

    number: int
    """Of the last life, ever."""
    lives: int
    """Since somebody looked: since the job was stopped last; without those that Slurm ended to take the nodes away."""
    without_progress: int
    """Of these the last ones after which no newer step was committed."""


def history(lines: list[Line], *, committed: int) -> History:
    """`committed`: the newest step now, -1: none. Needs no ends of lives, which a lost batch host does not write."""
    begins = [line for line in lines if line.get("what") == "life"]
    recent: list[Line] = []
    open_life = False
    for line in lines:
        if line.get("what") in ("life", "stuck"):
            recent.append(line)
            open_life = line["what"] == "life"
        elif line.get("what") == "decision":
            if line.get("then") == STOP:
                recent = []
            elif open_life and line.get("taken"):
                recent.pop()
            open_life = False
    idle = 0
    for line in reversed(recent):
        if int(line.get("step", -1)) < committed:
            break
        idle += 1
    number = max([int(line.get("life", 0)) for line in begins], default=0)
    return History(number=number, lives=len(recent), without_progress=idle)


def short(lines: list[Line]) -> int:
    """Attempts in a row, up to now, that were given too few nodes."""
    last = [n for n, line in enumerate(lines) if line.get("what") == "life"]
    return sum(line.get("what") == "short" for line in lines[last[-1] + 1 if last else 0 :])


def committed_step(run: Path) -> int:
    """The newest committed step; -1: none."""
    return max([step for step, path in by_step(run / CHECKPOINTS, suffix="") if path.is_dir()], default=-1)


def needed_lead(run: Path) -> float | None:
    """Seconds that a stop of the last life that logged may take: its slowest step, its slowest save, a margin. None: not known."""
    files = sorted(path for path in (run / METRICS).glob("*.jsonl") if path.stem.isdigit())
    for path in reversed(files):
        records = atomic.read_lines(path)
        steps = [line["perf/step_s"] for line in records if isinstance(line.get("perf/step_s"), int | float)]
        saves = [line["ckpt/save_s"] for line in records if isinstance(line.get("ckpt/save_s"), int | float)]
        if steps or saves:
            return float(max(steps, default=0.0) + max(saves, default=0.0) + MARGIN_SECONDS)
    return None

"""Every life of a run: who lived it, from which step to which, and how it ended.

`lives/0005.jsonl` belongs to the fifth owner of the run folder (the lease's epoch). Lines are only added, by that life's own
processes: its beginning, the step it goes on from, its end. No later life touches it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ecdit_train import atomic

FOLDER = "lives"


@dataclass(frozen=True, kw_only=True)
class Life:
    """What the lines of one life say together; None where no line says it."""

    number: int
    facts: dict[str, Any]

    @property
    def ended(self) -> bool:
        return "exit_code" in self.facts


def path_of(run: Path, *, number: int) -> Path:
    return run / FOLDER / f"{number:04d}.jsonl"


def note(run: Path, *, number: int, **facts: Any) -> None:
    """Add a line with the time and these facts. A disk that refuses is not a reason to end a run: nothing is raised."""
    atomic.append_line(path_of(run, number=number), facts)


def read(run: Path) -> list[Life]:
    """All lives, oldest first. What cannot be read is left out."""
    lives = []
    for path in sorted((run / FOLDER).glob("*.jsonl")):
        facts: dict[str, Any] = {}
        for told in atomic.read_lines(path):
            facts.setdefault("began", told.get("time"))
            # The first end that is told is the cause; a process that is ended for it may tell its own after.
            facts |= {k: v for k, v in told.items() if not ("exit_code" in facts and k in ("exit_code", "why"))}
        if path.stem.isdigit() and facts:
            lives.append(Life(number=int(path.stem), facts=facts))
    return lives

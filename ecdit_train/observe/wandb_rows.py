"""Which rows W&B may have. Pure.

A row that W&B has cannot be taken back, changed, or followed by one of an earlier step: its history only grows. A row of ours can
turn out not to count: a life that is killed trains again what came after its checkpoint, and a roll-back does so with other
samples. So a row waits until its step is committed, and goes then, once, in order of steps: what W&B has of a run is then
what `metrics.jsonl` says of it, whatever ended its lives.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Rows:
    """Rows by step, each with all that was logged for it."""

    def __init__(self, *, sent: int, committed: int, waits: bool = True) -> None:
        """
        Args:
            sent: the newest step that W&B has, from whichever life.
            committed: the newest step that cannot be taken back.
            waits: False: a row goes as soon as the next one comes; what is trained again keeps its first values.
        """
        self.sent, self._committed, self._waits = sent, committed, waits
        self._rows: dict[int, dict[str, Any]] = {}

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        """Part of the row of `step`; nothing where W&B has that row."""
        if step > self.sent:
            self._rows.setdefault(step, {}).update(values)

    def commit(self, step: int) -> None:
        self._committed = max(self._committed, step)

    def rewind(self, step: int) -> None:
        """Rows of later steps are of a past that is not the run's."""
        self._rows = {n: row for n, row in self._rows.items() if n <= step}

    def ready(self, *, last: bool = False) -> list[tuple[int, dict[str, Any]]]:
        """Rows to send now, in order, each to be told to `done` once W&B has it: one that fails waits with all that come after
        it, as W&B takes no row of an earlier step. `last`: nothing is added to the newest one any more."""
        limit = self._committed
        if not self._waits and self._rows:
            limit = max(limit, max(self._rows) - (not last))
        return [(step, self._rows[step]) for step in sorted(self._rows) if step <= limit]

    def done(self, step: int) -> None:
        """W&B has the row."""
        del self._rows[step]
        self.sent = step

    def __len__(self) -> int:
        """Rows that wait."""
        return len(self._rows)

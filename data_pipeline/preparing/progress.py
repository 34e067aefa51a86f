"""How far a preparation is: a live line on a terminal, else a plain line now and then."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from data_pipeline.preparing.drive import Watcher
from data_pipeline.preparing.work import Record

SECONDS = 10.0
"""Between plain lines."""


def watch(label: str, *, file: TextIO | None = None) -> Any:
    """A `drive.Watch` for people, on standard error."""
    out = file or sys.stderr
    return lambda total: (_Bar if out.isatty() else _Lines)(label, total=total, out=out)


class _Lines(Watcher):
    def __init__(self, label: str, *, total: int, out: TextIO) -> None:
        self._label, self._total, self._out = label, total, out
        self.done = self.samples = self.rejected = self._fresh = 0
        self._start = self._said = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._say()

    def finished(self, record: Record, *, fresh: bool) -> None:
        self.done += 1
        self.samples += record.kept
        self.rejected += sum(record.rejected.values())
        self._fresh += record.taken if fresh else 0
        if time.monotonic() - self._said >= SECONDS:
            self._say()

    def line(self) -> str:
        rate = f"{self._fresh / max(time.monotonic() - self._start, 1e-3):,.0f}/s, " if self._fresh else ""
        return f"{self._label}: {self.done:,}/{self._total:,} shards, {self.samples:,} samples, {rate}{self.rejected:,} rejected"

    def _say(self) -> None:
        print(self.line(), file=self._out, flush=True)
        self._said = time.monotonic()


class _Bar(_Lines):
    def __init__(self, label: str, *, total: int, out: TextIO) -> None:
        super().__init__(label, total=total, out=out)
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), console=Console(file=out)
        )
        self._task = self._bar.add_task(self.line(), total=total)

    def __enter__(self) -> _Bar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.update(self._task, description=self.line())
        self._bar.stop()

    def finished(self, record: Record, *, fresh: bool) -> None:
        super().finished(record, fresh=fresh)
        self._bar.update(self._task, completed=self.done, description=self.line())

    def _say(self) -> None:
        """Said by the bar."""

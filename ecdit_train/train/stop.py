"""Being asked to stop: a signal sets a flag, the loop reads it between steps.

Imports no torch, so that the command can listen before its slow imports begin.
"""

from __future__ import annotations

import signal
from typing import Any


class StopRequest:
    """SIGTERM, SIGINT and SIGUSR2 (Slurm's warning) set a flag; a second SIGINT kills."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)

    def __init__(self) -> None:
        self.name: str | None = None
        self._old: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for s in self.SIGNALS:
            self._old[s] = signal.signal(s, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for s, handler in self._old.items():
            signal.signal(s, handler)

    def _handle(self, number: int, _frame: object) -> None:
        if self.name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name

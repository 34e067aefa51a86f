"""Goodput: the share of time that went into steps that count. One definition, for a life's log and for `ecdit status`."""

from __future__ import annotations

from collections import deque

KEPT = 4096
"""Records that may be taken back; no run goes back further."""


class Useful:
    """Seconds of steps that count, record by record."""

    def __init__(self, *, first: int = 0) -> None:
        """`first`: steps that were done before."""
        self._done: deque[tuple[int, float]] = deque([(first, 0.0)], maxlen=KEPT)

    def add(self, step: int, step_s: float) -> None:
        """A record: so long took each step since the last one."""
        before, seconds = self._done[-1]
        self._done.append((step, seconds + step_s * max(step - before, 0)))

    def rewind(self, step: int) -> None:
        """Later steps were for nothing."""
        while len(self._done) > 1 and self._done[-1][0] > step:
            self._done.pop()

    def share(self, passed: float) -> float:
        """Of so many seconds, in whatever else happened too: 0 to 1."""
        return min(1.0, self._done[-1][1] / passed) if passed > 0 else 0.0

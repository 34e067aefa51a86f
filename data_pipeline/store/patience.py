"""How long a store is waited for, and how often it is asked again."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Patience:
    """Of one range: a piece of a file that is asked for at once.

    A range that has not come after `hedge_after` seconds is asked for a second time and the first answer is taken; None
    waits for three times what 95 of 100 took lately (`Hedging`), 0 never asks twice.
    """

    retries: int = 8
    """Requests after the first that failed."""
    back_off: float = 0.1
    """Seconds before the first of them, at most: each wait is drawn from 0 to a limit that doubles."""
    longest_wait: float = 10.0
    """Seconds, of that limit."""
    deadline: float = 120.0
    """Seconds for all of them together."""
    idle: float = 20.0
    """Seconds without a byte after which a request is given up."""
    hedge_after: float | None = None

    def wait(self, failures: int) -> float:
        """Seconds before the next request, after so many that failed. Full jitter: many ranks fail at once, and must not come back
        at once. This draw decides when something comes, never what."""
        return random.uniform(0, min(self.longest_wait, self.back_off * 2 ** (failures - 1)))


class Hedging:
    """When to ask a second time: after three times the 95th of 100 durations of late. The 99th itself would be a slow one where one
    request in a hundred is slow. At most one range in ten is asked for twice, or an overloaded store would get more to do."""

    SEEN = 64
    """Durations before it is known what is usual."""

    def __init__(self, after: float | None) -> None:
        self._fixed = after
        self._lately: deque[float] = deque(maxlen=512)
        self._after, self._new = 0.0, 0
        self.ranges = self.hedged = 0

    def done(self, seconds: float) -> None:
        """A range has come."""
        self.ranges += 1
        self._lately.append(seconds)
        self._new += 1
        if len(self._lately) >= self.SEEN and (self._new >= 32 or not self._after):
            self._after, self._new = 3 * sorted(self._lately)[int(0.95 * len(self._lately))], 0

    def after(self) -> float | None:
        """Seconds, or None: not."""
        if self._fixed is not None:
            return self._fixed or None
        if not self._after or self.hedged > 8 + self.ranges // 10:
            return None
        return max(0.02, self._after)

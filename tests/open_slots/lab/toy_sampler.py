"""A sampler of one's own: the midpoint rule, with short steps near the data.

Legend: B images, C channels, H W latent height and width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from ecdit_train.config.slots import SamplerConfig


@dataclass(frozen=True, kw_only=True)
class Midpoint(SamplerConfig):
    """Second order; steps shrink towards t = 1."""

    power: float
    """1: equal steps; above: short ones at the end."""

    def times(self, steps: int) -> tuple[float, ...]:
        return tuple(1.0 - (1.0 - n / steps) ** self.power for n in range(steps + 1))

    def integrate(self, velocity: Callable[[Tensor, float], Tensor], x: Tensor, *, times: tuple[float, ...]) -> Tensor:
        for t, after in pairwise(times):
            half = 0.5 * (after - t)
            x = x + 2 * half * velocity(x + half * velocity(x, t), t + half)
        return x

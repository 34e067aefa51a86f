"""Heun's method: two network calls a step, second order.

Legend: B images, C channels, H W latent height and width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from ecdit_train.config.slots import SamplerConfig


@dataclass(frozen=True, kw_only=True)
class Heun(SamplerConfig):
    """Averages the slopes of both ends of a step, except in the last one, whose end is t = 1."""

    def integrate(self, velocity: Callable[[Tensor, float], Tensor], x: Tensor, *, times: tuple[float, ...]) -> Tensor:
        for t, after in pairwise(times):
            v = velocity(x, t)
            if after < times[-1]:
                v = 0.5 * (v + velocity(x + (after - t) * v, after))
            x = x + (after - t) * v
        return x

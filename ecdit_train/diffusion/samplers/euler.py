"""Euler's method: one network call a step.

Legend: B images, C channels, H W latent height and width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from ecdit_train.config.slots import SamplerConfig


@dataclass(frozen=True, kw_only=True)
class Euler(SamplerConfig):
    """First order: x += dt v(x, t)."""

    def integrate(self, velocity: Callable[[Tensor, float], Tensor], x: Tensor, *, times: tuple[float, ...]) -> Tensor:
        for t, after in pairwise(times):
            x = x + (after - t) * velocity(x, t)
        return x

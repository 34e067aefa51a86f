"""The learning-rate schedule and the moving average of the weights; update rules are in `optimizers/`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ecdit_train.config.schema import OptimConfig

from .optimizers.blocks import Average, Choice, blocks_of


def learning_rate(step: int, config: OptimConfig, *, total_steps: int) -> float:
    """Rate of update `step` (counted from 0): linear warm-up, then constant (paper), cosine or linear to zero, or stable with a
    decay at the end (wsd; 1 - sqrt as in Haegele et al. 2024)."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
    if config.schedule == "linear":
        return config.lr * max(0.0, 1.0 - done)
    if config.schedule == "wsd":
        x = min(max(1.0 - (total_steps - step) / max(1, config.decay_steps), 0.0), 1.0)
        left = 1.0 - (x if config.decay_shape == "linear" else math.sqrt(x))
        return config.lr * (config.decay_floor + (1.0 - config.decay_floor) * left)
    return config.lr


class Ema:
    """Exponential moving average of every parameter, fp32, sharded like the parameter."""

    def __init__(self, params: Mapping[str, nn.Parameter], *, decay: float) -> None:
        self.decay = decay
        self._params = list(params.values())
        self.shadow: dict[str, Tensor] = {name: p.detach().clone() for name, p in params.items()}

    @torch.no_grad()
    def restart(self) -> None:
        """Begin anew from the weights as they are now."""
        for p, shadow in zip(self._params, self.shadow.values(), strict=True):
            shadow.copy_(p.detach())  # one by one: DTensor has no _foreach_copy_

    def weight(self, step: int) -> float:
        """Of the weights in their average after update `step`, counted from 0. A young average forgets faster: the
        first weights shall not linger."""
        return 1.0 - min(self.decay, (1.0 + step) / (10.0 + step))

    def beside(self, step: int) -> Average:
        """For an optimizer that updates it with the weights."""
        return Average(shadow=dict(zip(self._params, self.shadow.values(), strict=True)), weight=self.weight(step))

    @torch.no_grad()
    def update(self, step: int, *, refuse: Tensor | None = None) -> None:
        """After update `step`, unless the device refused that (`BlockOptimizer.found_inf`)."""
        if refuse is None:
            shadows = list(self.shadow.values())
            torch._foreach_lerp_(shadows, [p.detach() for p in self._params], self.weight(step))
            return
        choice = Choice(refuse)
        for p, shadow in zip(self._params, self.shadow.values(), strict=True):
            for new, old in blocks_of([p, shadow]):
                choice.write(old.lerp(new, self.weight(step)), into=old)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The model holds the averaged weights inside; values change places bitwise, one tensor at a time."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for p, shadow in zip(self._params, self.shadow.values(), strict=True):
            held = p.detach().clone()
            p.copy_(shadow)
            shadow.copy_(held)

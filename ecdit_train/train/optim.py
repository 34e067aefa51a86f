"""Optimizers, the learning-rate schedule and the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ecdit_train.config.schema import OptimConfig


def learning_rate(step: int, config: OptimConfig, *, total_steps: int) -> float:
    """Rate of update `step` (counted from 0): linear warm-up, then constant (paper), cosine or linear to zero."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
    if config.schedule == "linear":
        return config.lr * max(0.0, 1.0 - done)
    return config.lr


def make_optimizer(params: list[nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    """RMSProp with momentum (paper) or AdamW; weight decay is decoupled, p <- p (1 - lr wd), and spares vectors (norms, biases).

    State is made now, not at the first step: its memory shows up at the start, and a checkpoint can be loaded into it.
    """
    matrices, vectors = [p for p in params if p.dim() > 1], [p for p in params if p.dim() <= 1]
    groups = [{"params": group, "weight_decay": decay}
              for group, decay in ((matrices, config.weight_decay), (vectors, 0.0)) if group]  # fmt: skip
    optimizer: torch.optim.Optimizer
    if config.kind == "rmsprop":
        for group in groups:
            group["weight_decay"] = (
                0.0  # torch's RMSProp would add it to the gradient and divide it by the gradient's size
            )
        optimizer = torch.optim.RMSprop(
            groups, lr=config.lr, alpha=config.decay, eps=config.eps, momentum=config.momentum, foreach=True
        )
        if config.weight_decay > 0 and matrices:
            optimizer.register_step_pre_hook(_Decay(matrices, config.weight_decay))
        names = ["square_avg"] + (["momentum_buffer"] if config.momentum > 0 else [])
    else:
        betas = (config.beta1, config.beta2)
        optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, foreach=True)
        names = ["exp_avg", "exp_avg_sq"]
    for p in params:
        optimizer.state[p] = {"step": torch.tensor(0.0), **{name: torch.zeros_like(p) for name in names}}
    return optimizer


class _Decay:
    """Shrinks matrices by 1 - lr wd before a step, as AdamW does."""

    def __init__(self, matrices: list[nn.Parameter], weight_decay: float) -> None:
        self._matrices, self._weight_decay = [p.detach() for p in matrices], weight_decay

    @torch.no_grad()
    def __call__(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        torch._foreach_mul_(self._matrices, 1.0 - optimizer.param_groups[0]["lr"] * self._weight_decay)


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

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After update `step`, counted from 0. A young average forgets faster: the first weights shall not linger."""
        decay = min(self.decay, (1.0 + step) / (10.0 + step))
        torch._foreach_lerp_(list(self.shadow.values()), [p.detach() for p in self._params], 1.0 - decay)

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

"""RMSProp with momentum, the paper's optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ecdit_train.config.rules import Checker
from ecdit_train.config.schema import RunConfig
from ecdit_train.config.slots import OptimizerConfig
from ecdit_train.parallel.owners import Sharding

from . import make_state, matrices_and_vectors


@dataclass(frozen=True, kw_only=True)
class RMSProp(OptimizerConfig):
    """RMSProp with momentum and decoupled weight decay on matrices."""

    momentum: float
    """The paper says "with momentum" and no value."""
    decay: float
    """Decay of the mean squared gradient (alpha); not in the paper."""
    eps: float
    """Added to the root of the mean squared gradient."""
    weight_decay: float
    """Decoupled weight decay on matrices, p <- p (1 - lr wd)."""

    def state_bytes(self, name: str, shape: tuple[int, ...]) -> float:
        return 8.0 if self.momentum > 0 else 4.0

    def check(self, run: RunConfig, check: Checker, *, key: str) -> None:
        check.share([f"{key}.momentum", f"{key}.decay"], below_one=True)
        check.positive([f"{key}.eps"])
        check.at_least(0, [f"{key}.weight_decay"])

    def build(
        self, params: Mapping[str, nn.Parameter], *, lr: float, sharding: Sharding | None = None
    ) -> torch.optim.Optimizer:
        # Not torch's own weight decay: it would be added to the gradient and divided by the gradient's size.
        groups = matrices_and_vectors(params, weight_decay=0.0)
        optimizer = torch.optim.RMSprop(
            groups, lr=lr, alpha=self.decay, eps=self.eps, momentum=self.momentum, foreach=True
        )
        matrices = [p for p in params.values() if p.dim() > 1]
        if self.weight_decay > 0 and matrices:
            optimizer.register_step_pre_hook(_Decay(matrices, self.weight_decay))
        names = ("square_avg", *(["momentum_buffer"] if self.momentum > 0 else []))
        make_state(optimizer, params.values(), names=names)
        return optimizer


class _Decay:
    """Shrinks matrices by 1 - lr wd before a step, as AdamW does."""

    def __init__(self, matrices: list[nn.Parameter], weight_decay: float) -> None:
        self._matrices, self._weight_decay = [p.detach() for p in matrices], weight_decay

    @torch.no_grad()
    def __call__(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        torch._foreach_mul_(self._matrices, 1.0 - optimizer.param_groups[0]["lr"] * self._weight_decay)

"""RMSProp with momentum, the paper's optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ecdit_train.config.rules import Checker
from ecdit_train.config.schema import RunConfig
from ecdit_train.config.slots import OptimizerConfig
from ecdit_train.parallel.owners import Sharding

from . import make_state, matrices_and_vectors
from .blocks import BlockOptimizer


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
        return RMSPropOptimizer(self, matrices_and_vectors(params, weight_decay=self.weight_decay), lr=lr)


class RMSPropOptimizer(BlockOptimizer):
    """torch.optim.RMSprop (foreach), with its names of state and its bits, block by block.

    Not torch's own weight decay: that is added to the gradient and divided by the gradient's size.
    """

    def __init__(self, config: RMSProp, groups: Sequence[Mapping[str, Any]], *, lr: float) -> None:
        super().__init__(groups, lr=lr)
        self._config = config
        self.states = ("square_avg", *(["momentum_buffer"] if config.momentum > 0 else []))
        make_state(self, (p for group in self.param_groups for p in group["params"]), names=self.states)

    def rule(self, p: Tensor, g: Tensor | None, *state: Tensor, group: Mapping[str, Any], step: float) -> list[Tensor]:
        """s <- decay s + (1 - decay) g^2; b <- momentum b + g / (sqrt(s) + eps); p <- p (1 - lr wd) - lr b."""
        c, lr = self._config, group["lr"]
        if group["weight_decay"] > 0:
            p = p * (1.0 - lr * group["weight_decay"])
        if g is None:
            return [p, *state]
        square = state[0].mul(c.decay).addcmul_(g, g, value=1 - c.decay)
        root = square.sqrt().add_(c.eps)
        if c.momentum == 0:
            return [p.addcdiv(g, root, value=-lr), square]
        momentum = state[1].mul(c.momentum).addcdiv_(g, root)
        return [p.add(momentum, alpha=-lr), square, momentum]

"""AdamW (Loshchilov & Hutter 2019)."""

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
class AdamW(OptimizerConfig):
    """Adam with decoupled weight decay on matrices."""

    beta1: float
    """Decay of the mean gradient."""
    beta2: float
    """Decay of the mean squared gradient."""
    eps: float
    """Added to the root of the mean squared gradient."""
    weight_decay: float
    """Decoupled weight decay on matrices, p <- p (1 - lr wd)."""

    def check(self, run: RunConfig, check: Checker, *, key: str) -> None:
        check.share([f"{key}.beta1", f"{key}.beta2"], below_one=True)
        check.positive([f"{key}.eps"])
        check.at_least(0, [f"{key}.weight_decay"])

    def build(
        self, params: Mapping[str, nn.Parameter], *, lr: float, sharding: Sharding | None = None
    ) -> torch.optim.Optimizer:
        groups = matrices_and_vectors(params, weight_decay=self.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=lr, betas=(self.beta1, self.beta2), eps=self.eps, foreach=True)
        make_state(optimizer, params.values(), names=("exp_avg", "exp_avg_sq"))
        return optimizer

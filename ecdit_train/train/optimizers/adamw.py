"""AdamW (Loshchilov & Hutter 2019)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw as functional_adamw

from ecdit_train.config.rules import Checker
from ecdit_train.config.schema import RunConfig
from ecdit_train.config.slots import OptimizerConfig
from ecdit_train.parallel.owners import Sharding
from ecdit_train.parallel.placement import local

from . import make_state, matrices_and_vectors
from .blocks import BlockOptimizer


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
        if all(p.device.type == "cuda" for p in params.values()):
            return FusedAdamW(self, groups, lr=lr)
        return AdamWOptimizer(self, groups, lr=lr)


class AdamWOptimizer(BlockOptimizer):
    """torch.optim.AdamW (foreach), with its names of state and its bits, block by block."""

    states = ("exp_avg", "exp_avg_sq")
    counts = True

    def __init__(self, config: AdamW, groups: Sequence[Mapping[str, Any]], *, lr: float) -> None:
        super().__init__(groups, lr=lr)
        self._config = config
        make_state(self, (p for group in self.param_groups for p in group["params"]), names=self.states)

    def rule(self, p: Tensor, g: Tensor | None, *state: Tensor, group: Mapping[str, Any], step: float) -> list[Tensor]:
        """m <- beta1 m + (1 - beta1) g; v <- beta2 v + (1 - beta2) g^2; p <- p (1 - lr wd) - lr m' / (sqrt(v') + eps), where m' and
        v' are m and v over 1 - beta^step."""
        c, lr = self._config, group["lr"]
        if g is None:
            return [p, *state]
        if group["weight_decay"] != 0:
            p = p * (1 - lr * group["weight_decay"])
        mean = state[0].lerp(g, 1 - c.beta1)
        square = state[1].mul(c.beta2).addcmul_(g, g, value=1 - c.beta2)
        root = square.sqrt().div_((1 - c.beta2**step) ** 0.5).add_(c.eps)
        return [p.addcdiv(mean, root, value=(lr / (1 - c.beta1**step)) * -1), mean, square]


class FusedAdamW(torch.optim.Optimizer):
    """torch's fused kernel, which knows `found_inf` itself, on this rank's shards: a DTensor's dispatch would cost more
    than they do, and refuses parameters of two meshes."""

    _step_supports_amp_scaling = True

    def __init__(self, config: AdamW, groups: Sequence[Mapping[str, Any]], *, lr: float) -> None:
        super().__init__([dict(group) for group in groups], {"lr": lr})
        self._config = config
        self.found_inf: Tensor | None = None
        for group in self.param_groups:
            make_state(self, group["params"], names=("exp_avg", "exp_avg_sq"))
            for p in group["params"]:
                self.state[p]["step"] = torch.zeros((), device=p.device)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None, "the training step computes gradients itself"
        for group in self.param_groups:
            some = [p for p in group["params"] if p.grad is not None and local(p.grad).numel()]
            states = [self.state[p] for p in some]
            if not some:
                continue
            functional_adamw(
                [local(p.detach()) for p in some],
                [local(p.grad) for p in some if p.grad is not None],
                exp_avgs=[local(state["exp_avg"]) for state in states],
                exp_avg_sqs=[local(state["exp_avg_sq"]) for state in states],
                max_exp_avg_sqs=[],
                state_steps=[state["step"] for state in states],
                fused=True,
                found_inf=self.found_inf,
                amsgrad=False,
                beta1=self._config.beta1,
                beta2=self._config.beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=self._config.eps,
                maximize=False,
            )

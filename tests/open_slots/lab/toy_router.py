"""A router of one's own: expert choice on sigmoid affinities, corrected by how high each expert's affinity usually is.

It has a loss (`spread`), a buffer (`usual`) and a parameter that starts at 1 (`sharpness`): everything that a router may have.

Legend: G routing groups, S tokens of a group, D hidden width, E experts, C capacity.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ecdit_train.config.rules import Checker
from ecdit_train.config.schema import RunConfig
from ecdit_train.config.slots import RouterConfig, RouterSizes
from ecdit_train.model.assignment import Table
from ecdit_train.model.router import Router, RouterInput, whole_capacity


@dataclass(frozen=True, kw_only=True)
class Corrected(RouterConfig):
    """Expert choice on affinities less their running mean."""

    capacity_factor: float
    """Mean experts per token."""
    spread_weight: float
    """Weight of the loss that keeps experts' mean affinities alike."""
    momentum: float
    """Share of the old mean that a step keeps."""

    def experts_per_token(self) -> float:
        return self.capacity_factor

    def capacity(self, *, group_tokens: int, num_experts: int) -> float:
        return group_tokens * self.capacity_factor / num_experts

    def check(self, run: RunConfig, check: Checker, *, key: str) -> None:
        check.positive([f"{key}.capacity_factor"])
        check.share([f"{key}.momentum"], below_one=True)

    def build(self, sizes: RouterSizes) -> CorrectedRouter:
        return CorrectedRouter(self, sizes)


class CorrectedRouter(Router):
    constants: ClassVar[Mapping[str, float]] = {"sharpness": 1.0}
    usual: Tensor

    def __init__(self, config: Corrected, sizes: RouterSizes) -> None:
        super().__init__()
        self.config = config
        num_experts = sizes.num_experts
        self.weight = nn.Parameter(torch.empty(sizes.width, num_experts))
        self.sharpness = nn.Parameter(torch.empty(num_experts))
        self.register_buffer("usual", torch.empty(num_experts))

    def reset_buffers(self) -> None:
        self.usual.fill_(0.5)

    def forward(self, tokens: RouterInput) -> Table:
        x_GSD = tokens.x_GSD
        G, S, _ = x_GSD.shape
        E = self.weight.shape[1]
        dtype = torch.promote_types(x_GSD.dtype, torch.float32)
        a_GSE = ((x_GSD.to(dtype) @ self.weight.to(dtype)) * self.sharpness.to(dtype)).sigmoid()
        C = whole_capacity(self.config.capacity(group_tokens=S, num_experts=E), tokens=S)
        index_EGC = (a_GSE.detach() - self.usual).permute(2, 0, 1).topk(C, dim=-1).indices
        mean_E = a_GSE.mean((0, 1))
        return Table(
            index_EGC=index_EGC + torch.arange(G, device=x_GSD.device)[:, None] * S,
            gate_EGC=a_GSE.permute(2, 0, 1).gather(2, index_EGC),
            probability_GSE=(a_GSE / a_GSE.sum(-1, keepdim=True)).detach(),
            losses={"spread": self.config.spread_weight * a_GSE.mean(1).var(-1).mean()},
            observed={"usual": mean_E.detach()},
            metrics={"usual_max": self.usual.max()},
        )

    def update_buffers(self, observed: Mapping[str, Tensor]) -> None:
        self.usual.lerp_(observed["usual"].to(self.usual.dtype), 1.0 - self.config.momentum)

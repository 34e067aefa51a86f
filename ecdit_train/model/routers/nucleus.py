"""Nucleus-Image's router (arXiv 2604.12163): expert choice whose gates are shares of a token.

Every expert takes its C = S * f_c / E best tokens of a group (there: of an image, `moe.scope=image`). A token's gates are its
scores over the experts that took it, divided by their sum, times one constant: how much all experts together add to a token
does not depend on how many took it. By default the router sees [t ; x]: the token before its modulation, beside its timestep.

Legend: G routing groups, S tokens of a group, D hidden width, E experts, C capacity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ecdit_train.config.rules import Checker
from ecdit_train.config.schedule import ScheduledCapacity
from ecdit_train.config.schema import RunConfig
from ecdit_train.config.slots import RouterSizes

from ..assignment import Table
from ..router import RouterInput, ScheduledRouter

TINY = 1e-12
"""Added to a token's sum of scores before the division."""


@dataclass(frozen=True, kw_only=True)
class Nucleus(ScheduledCapacity):
    """Expert choice with gates normalised over the experts that took a token. C must be whole; Nucleus-Image rounds it up."""

    scores: Literal["softmax", "sigmoid"]
    """Of the logits: softmax over experts, or each expert's own sigmoid."""
    route_scale: float
    """What a token's gates add up to, where any expert took it."""

    def check(self, run: RunConfig, check: Checker, *, key: str) -> None:
        super().check(run, check, key=key)
        check.positive([f"{key}.route_scale"])

    def kept_bytes_per_token(self, sizes: RouterSizes, *, compute_bytes: int) -> float:
        """As any router, and the mask of who was taken by whom."""
        return super().kept_bytes_per_token(sizes, compute_bytes=compute_bytes) + 4.0 * sizes.num_experts

    def build(self, sizes: RouterSizes) -> NucleusRouter:
        return NucleusRouter(sizes, config=self)


class NucleusRouter(ScheduledRouter):
    config: Nucleus

    def forward(self, tokens: RouterInput) -> Table:
        G, S, _ = tokens.x_GSD.shape
        logits_GSE = self.logits(tokens)
        softmax = self.config.scores == "softmax"
        s_EGS = (logits_GSE.softmax(-1) if softmax else logits_GSE.sigmoid()).permute(2, 0, 1)
        s_EGC, index_EGC = s_EGS.topk(self.capacity(S), dim=-1, sorted=False)
        # A sum over experts, not a scatter by token: atomics would add in another order on every run of a GPU.
        taken_EGS = torch.zeros_like(s_EGS).scatter(2, index_EGC, 1.0)
        sum_GS = (s_EGS * taken_EGS).sum(0)
        gate_EGC = self.config.route_scale * s_EGC / (sum_GS.expand_as(s_EGS).gather(2, index_EGC) + TINY)
        first = torch.arange(G, device=s_EGS.device)[:, None] * S
        p_GSE = s_EGS.detach().permute(1, 2, 0)
        return Table(
            index_EGC=index_EGC + first,
            gate_EGC=gate_EGC,
            probability_GSE=p_GSE if softmax else p_GSE / (p_GSE.sum(-1, keepdim=True) + TINY),
        )

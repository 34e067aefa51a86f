"""Expert choice, the paper's router: every expert takes its C tokens of highest affinity in each group (paper eq. 6).

Legend: G routing groups, S tokens of a group, D hidden width, E experts, C capacity.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ecdit_train.config.rules import Checker
from ecdit_train.config.schema import RunConfig
from ecdit_train.config.slots import RouterConfig, RouterSizes, Sees

from ..assignment import Table
from ..router import AffinityRouter, RouterInput, whole_capacity


@dataclass(frozen=True, kw_only=True)
class ExpertChoice(RouterConfig):
    """Each expert takes its best C tokens of a group, so load is equal by construction and no balancing loss exists."""

    capacity_factor: float
    """f_c: mean experts per token; each expert takes C = group * f_c / E tokens, which must be whole."""

    sees: Sees
    """What affinities are computed from: modulated (what the experts see), hidden (x', the residual stream) or timestep (the
    unmodulated token and its timestep)."""

    def experts_per_token(self) -> float:
        return self.capacity_factor

    def capacity(self, *, group_tokens: int, num_experts: int) -> float:
        return group_tokens * self.capacity_factor / num_experts

    def check(self, run: RunConfig, check: Checker, *, key: str) -> None:
        E = run.moe.num_experts
        if check.positive([f"{key}.capacity_factor"]) and check.sane("moe.num_experts"):
            rule = f"must not exceed moe.num_experts = {E}: an expert cannot take a token twice"
            check.require(self.capacity_factor <= E, f"{key}.capacity_factor", rule=rule, nearest=float(E))

    def build(self, sizes: RouterSizes) -> ExpertChoiceRouter:
        return ExpertChoiceRouter(sizes, config=self)


class ExpertChoiceRouter(AffinityRouter):
    """Gates are the affinities themselves."""

    def __init__(self, sizes: RouterSizes, *, config: ExpertChoice) -> None:
        super().__init__(sizes, sees=config.sees)
        self.config = config

    def forward(self, tokens: RouterInput) -> Table:
        G, S, _ = tokens.x_GSD.shape
        exact = self.config.capacity(group_tokens=S, num_experts=self.weight.shape[1])
        a_GSE = self.affinity(tokens)
        # Expert-major from the start, so that the gather writes the operand of the batched product directly.
        gate_EGC, index_EGC = a_GSE.permute(2, 0, 1).topk(whole_capacity(exact, tokens=S), dim=-1, sorted=False)
        first = torch.arange(G, device=a_GSE.device)[:, None] * S
        return Table(index_EGC=index_EGC + first, gate_EGC=gate_EGC, probability_GSE=a_GSE.detach())

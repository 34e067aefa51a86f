"""Token choice, the GShard baseline (Lepikhin et al. 2020): every token takes its k best experts.

Legend: G routing groups, S tokens of a group, D hidden width, E experts, C capacity, k experts per token, Q = k * S
choices of a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ecdit_train.config.rules import Checker
from ecdit_train.config.schema import RunConfig
from ecdit_train.config.slots import RouterConfig, RouterSizes, Sees

from ..assignment import Table
from ..router import AffinityRouter, RouterInput, whole_capacity


@dataclass(frozen=True, kw_only=True)
class TokenChoice(RouterConfig):
    """Each token takes its best top_k experts; an expert serves the first C of a group and drops the rest."""

    capacity_factor: float
    """f_c: each expert has C = group * f_c / E slots, which must be whole."""
    top_k: int
    """Experts per token."""
    balance_weight: float
    """Weight of the auxiliary load-balance loss."""

    sees: Sees
    """What affinities are computed from: modulated (what the experts see), hidden (x', the residual stream) or timestep (the
    unmodulated token and its timestep)."""

    def experts_per_token(self) -> float:
        return self.capacity_factor

    def capacity(self, *, group_tokens: int, num_experts: int) -> float:
        return group_tokens * self.capacity_factor / num_experts

    def check(self, run: RunConfig, check: Checker, *, key: str) -> None:
        E = run.moe.num_experts
        check.positive([f"{key}.capacity_factor"])
        check.at_least(0, [f"{key}.balance_weight"])
        if check.at_least(1, [f"{key}.top_k"]) and check.sane("moe.num_experts"):
            rule = f"must not exceed moe.num_experts = {E}"
            check.require(self.top_k <= E, f"{key}.top_k", rule=rule, nearest=E)

    def build(self, sizes: RouterSizes) -> TokenChoiceRouter:
        return TokenChoiceRouter(sizes, config=self)


class TokenChoiceRouter(AffinityRouter):
    """First choices are served before second ones; gates are normalised over the token's k choices.

    The balance loss of a group is weight * E * sum_e f_e P_e, with f_e the share of tokens whose first choice is e and
    P_e the mean affinity.
    """

    def __init__(self, sizes: RouterSizes, *, config: TokenChoice) -> None:
        super().__init__(sizes, sees=config.sees)
        self.config = config

    def forward(self, tokens: RouterInput) -> Table:
        G, S, _ = tokens.x_GSD.shape
        E = self.weight.shape[1]
        C = whole_capacity(self.config.capacity(group_tokens=S, num_experts=E), tokens=S)
        a_GSE = self.affinity(tokens)
        gate_GSk, expert_GSk = a_GSE.topk(self.config.top_k, dim=-1)
        gate_GSk = gate_GSk / (gate_GSk.sum(-1, keepdim=True) + 1e-9)

        # Queue: all first choices in token order, then all second ones. A stable sort by expert gives each its place.
        expert_GQ = expert_GSk.transpose(1, 2).reshape(G, -1)
        gate_GQ = gate_GSk.transpose(1, 2).reshape(G, -1)
        sorted_GQ, order_GQ = expert_GQ.sort(dim=1, stable=True)
        first_GE = torch.searchsorted(sorted_GQ, torch.arange(E, device=a_GSE.device).expand(G, E).contiguous())
        place_GQ = torch.arange(sorted_GQ.shape[1], device=a_GSE.device) - first_GE.gather(1, sorted_GQ)

        # Slot table of one group: E * C slots and one more where everything beyond capacity lands.
        slot_GQ = torch.where(place_GQ < C, sorted_GQ * C + place_GQ, E * C)
        # An empty slot points at its own group's first token, so that groups can be cut apart.
        first_G1 = torch.arange(G, device=a_GSE.device)[:, None] * S
        index = first_G1.repeat(1, E * C + 1).scatter(1, slot_GQ, order_GQ % S + first_G1)
        gate = torch.zeros(G, E * C + 1, dtype=gate_GQ.dtype, device=a_GSE.device)
        gate = gate.scatter(1, slot_GQ, gate_GQ.gather(1, order_GQ))
        filled = torch.zeros(G, E * C + 1, dtype=torch.bool, device=a_GSE.device).scatter(1, slot_GQ, True)

        def expert_major(table: Tensor) -> Tensor:
            return table[:, : E * C].view(G, E, C).transpose(0, 1).contiguous()

        filled_EGC = expert_major(filled)
        choices = torch.full((), expert_GQ.numel(), device=a_GSE.device)
        return Table(
            index_EGC=expert_major(index),
            gate_EGC=expert_major(gate),
            filled_EGC=filled_EGC,
            probability_GSE=a_GSE.detach(),
            losses={"balance": self.config.balance_weight * _balance(a_GSE, expert_GSk[:, :, 0])},
            shares={"overflow_frac": (choices - filled_EGC.sum(), choices)},
        )


def _balance(a_GSE: Tensor, first_GS: Tensor) -> Tensor:
    """E * sum_e f_e P_e, mean over groups; f_e carries no gradient."""
    _, S, E = a_GSE.shape
    counts_GE = torch.zeros_like(a_GSE[:, 0]).scatter_add(1, first_GS, torch.ones_like(a_GSE[:, :, 0]))
    return E * ((counts_GE / S) * a_GSE.mean(1)).sum(-1).mean()

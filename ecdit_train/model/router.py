"""Who works on which token: expert choice (each expert takes its best C tokens) and token choice (the GShard baseline).

Legend: G routing pools, S tokens of a pool, D hidden width, E experts, C capacity (tokens an expert takes of a pool, a
Python int: shapes are static and nothing waits for the device), k experts per token of token choice.

Routing runs in fp32 whatever the compute precision is. Nothing here ever builds a one-hot tensor: an assignment is a
table of token indices and gates, (E, G, C) each, and stays on the rank that made it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """Which tokens each expert takes, and with which weight."""

    index_EGC: Tensor
    """Row of the flattened (G * S, D) tokens, int64."""
    gate_EGC: Tensor
    """Combine weight, fp32; 0 in a slot of token choice that no token filled."""
    filled_EGC: Tensor | None
    """False in empty slots; None when every slot is filled (expert choice)."""
    probability_GSE: Tensor
    """Softmax over experts, fp32, detached: for metrics."""
    balance_loss: Tensor | None
    """Token choice's auxiliary loss, weight included."""
    num_dropped: Tensor | None = None
    """Token choice: (token, choice) pairs beyond capacity; a device scalar, so reading it is the caller's sync."""


class Router(nn.Module):
    """Affinity of tokens and experts, softmax over experts: A = softmax(x W_r) (paper eq. 5)."""

    def __init__(self, width: int, *, experts: int, capacity_factor: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, experts))
        self.capacity_factor = capacity_factor

    def capacity(self, pool: int) -> int:
        """C = pool * f_c / E; configuration has been checked for a whole number."""
        exact = pool * self.capacity_factor / self.weight.shape[1]
        capacity = round(exact)
        assert capacity >= 1, f"capacity {exact} is below one token"
        assert abs(exact - capacity) < 1e-6, f"capacity {exact} is not whole"
        return capacity

    def affinity(self, x_GSD: Tensor) -> Tensor:
        """(G, S, E) fp32."""
        with torch.autocast(x_GSD.device.type, enabled=False):
            dtype = torch.promote_types(x_GSD.dtype, torch.float32)
            return (x_GSD.to(dtype) @ self.weight.to(dtype)).softmax(dim=-1)


class ExpertChoiceRouter(Router):
    """Every expert takes its C tokens of highest affinity in each pool; gates are the affinities (paper eq. 6)."""

    def forward(self, x_GSD: Tensor) -> Assignment:
        G, S, _ = x_GSD.shape
        capacity = min(self.capacity(S), S)
        a_GSE = self.affinity(x_GSD)
        # Expert-major from the start, so that the gather writes the operand of the batched product directly.
        gate_EGC, index_EGC = a_GSE.permute(2, 0, 1).topk(capacity, dim=-1, sorted=False)
        first = torch.arange(G, device=x_GSD.device)[:, None] * S
        return Assignment(
            index_EGC=index_EGC + first,
            gate_EGC=gate_EGC,
            filled_EGC=None,
            probability_GSE=a_GSE.detach(),
            balance_loss=None,
        )


class TokenChoiceRouter(Router):
    """Every token takes its k best experts; an expert serves the first C of a pool, first choices before second ones.

    GShard (Lepikhin et al. 2020): gates are normalised over the token's k choices; tokens beyond capacity are dropped.
    The balance loss of a pool is weight * E * sum_e f_e P_e, with f_e the share of tokens whose first choice is e and
    P_e the mean affinity; its mean over pools is returned, so that it does not depend on how pools are spread over
    ranks.
    """

    def __init__(self, width: int, *, experts: int, capacity_factor: float, top_k: int, balance_weight: float) -> None:
        super().__init__(width, experts=experts, capacity_factor=capacity_factor)
        self.top_k = top_k
        self.balance_weight = balance_weight

    def forward(self, x_GSD: Tensor) -> Assignment:
        G, S, _ = x_GSD.shape
        E, C = self.weight.shape[1], min(self.capacity(S), S)
        a_GSE = self.affinity(x_GSD)
        gate_GSk, expert_GSk = a_GSE.topk(self.top_k, dim=-1)
        gate_GSk = gate_GSk / (gate_GSk.sum(-1, keepdim=True) + 1e-9)

        # Queue: all first choices in token order, then all second ones. A stable sort by expert gives each its place.
        expert_GQ = expert_GSk.transpose(1, 2).reshape(G, -1)
        gate_GQ = gate_GSk.transpose(1, 2).reshape(G, -1)
        sorted_GQ, order_GQ = expert_GQ.sort(dim=1, stable=True)
        first_GE = torch.searchsorted(sorted_GQ, torch.arange(E, device=x_GSD.device).expand(G, E).contiguous())
        place_GQ = torch.arange(sorted_GQ.shape[1], device=x_GSD.device) - first_GE.gather(1, sorted_GQ)

        # Slot table of one pool: E * C slots and one more where everything beyond capacity lands.
        slot_GQ = torch.where(place_GQ < C, sorted_GQ * C + place_GQ, E * C)
        # An empty slot points at its own pool's first token, so that pools can be cut apart.
        first_G1 = torch.arange(G, device=x_GSD.device)[:, None] * S
        index = first_G1.repeat(1, E * C + 1).scatter(1, slot_GQ, order_GQ % S + first_G1)
        gate = torch.zeros(G, E * C + 1, dtype=gate_GQ.dtype, device=x_GSD.device)
        gate = gate.scatter(1, slot_GQ, gate_GQ.gather(1, order_GQ))
        filled = torch.zeros(G, E * C + 1, dtype=torch.bool, device=x_GSD.device).scatter(1, slot_GQ, True)

        def expert_major(table: Tensor) -> Tensor:
            return table[:, : E * C].view(G, E, C).transpose(0, 1).contiguous()

        first_choices_GE = torch.zeros_like(a_GSE[:, 0]).scatter_add(
            1, expert_GSk[:, :, 0], torch.ones_like(a_GSE[:, :, 0])
        )
        balance = E * ((first_choices_GE / S) * a_GSE.mean(1)).sum(-1).mean()
        return Assignment(
            index_EGC=expert_major(index),
            gate_EGC=expert_major(gate),
            filled_EGC=expert_major(filled),
            probability_GSE=a_GSE.detach(),
            balance_loss=self.balance_weight * balance,
            num_dropped=(place_GQ >= C).sum(),
        )


def experts_per_token(assignment: Assignment) -> Tensor:
    """How many experts took each token: (G, S) int64. The sum over S is E * C for expert choice, by construction."""
    G, S, _ = assignment.probability_GSE.shape
    index = assignment.index_EGC.flatten()
    one = torch.ones_like(index) if assignment.filled_EGC is None else assignment.filled_EGC.flatten().to(torch.int64)
    return torch.zeros(G * S, dtype=torch.int64, device=index.device).index_add(0, index, one).view(G, S)

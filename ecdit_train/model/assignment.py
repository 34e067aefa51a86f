"""Who works on which token: what a router says and a dispatcher carries out.

Legend: G routing groups, S tokens of a group, N = G * S tokens, E experts, C capacity (rows of an expert and group, a Python int:
shapes are static and nothing waits for the device), R rows in all (one token at one expert) where their number varies.

Nothing here is a one-hot tensor of the dispatch: tables and lists of token indices and gates, which stay on the
rank that made them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What every form of it carries."""

    probability_GSE: Tensor
    """Normalised affinity of tokens and experts, fp32, detached: for metrics."""
    losses: Mapping[str, Tensor] = field(default_factory=dict)
    """Auxiliary losses by name, weight included: scalars, each a mean over groups, so that it does not depend on how
    groups are spread over ranks. They are added to the training loss and logged as `train/NAME_loss`."""
    targets: Mapping[str, tuple[float, Tensor]] = field(default_factory=dict)
    """Own predictions of what the network predicts, (G, S, P), each with the weight of its loss: the training step adds weight *
    the network's own loss of that prediction, logged as `train/NAME_loss`. Only while training."""
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    """Scalars for the logs, as `moe/L{n}/NAME`: means over the tokens or groups at hand, as the logs average them over the
    microbatches and ranks of a step; of a name that ends in `_max` they take the largest."""
    shares: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """The same for ratios: (part, whole), two scalars that are added up before they are divided."""
    observed: Mapping[str, Tensor] = field(default_factory=dict)
    """What the router has seen for its buffers, each a mean over groups, detached. Averaged over the microbatches and
    ranks of a step, then given to `Router.update_buffers` once: forward passes may be repeated (activation
    checkpointing) and must not write."""


@dataclass(frozen=True, kw_only=True)
class Table(Assignment):
    """A fixed number of rows: C per expert and group."""

    index_EGC: Tensor
    """Row of the flattened (G * S, D) tokens, int64."""
    gate_EGC: Tensor
    """Combine weight, fp32; 0 in a slot that no token filled."""
    filled_EGC: Tensor | None = None
    """False in empty slots; None when every slot is filled."""


@dataclass(frozen=True, kw_only=True)
class Selection(Assignment):
    """A varying number of rows per expert, as a router says it. `Dispatcher.settle` makes a Table or Rows of it."""

    selected_GSE: Tensor
    """True where an expert takes a token."""
    gate_GSE: Tensor
    """Combine weight, fp32; read where selected."""
    mean_rows: float
    """Rows that an expert is expected to take of a group: the unit of a cap."""

    def rows(self) -> Rows:
        """The rows that were selected, sorted by expert. Waits for the device, which knows how many there are."""
        E = self.selected_GSE.shape[-1]
        expert_R, index_R = self.selected_GSE.permute(2, 0, 1).reshape(E, -1).nonzero().t().contiguous()
        gate_R = self.gate_GSE.reshape(-1).index_select(0, index_R * E + expert_R)
        return Rows(**_common(self), expert_R=expert_R, index_R=index_R, gate_R=gate_R)

    def capped(self, cap: float) -> Table:
        """At most ceil(cap * mean_rows) rows per expert and group: those of the highest gates; the rest is dropped, and
        counted in the share `capped_frac`. Static: nothing waits for the device."""
        G, S, _ = self.selected_GSE.shape
        capacity = min(max(math.ceil(cap * self.mean_rows - 1e-9), 1), S)
        selected_EGS, gate_EGS = (x.permute(2, 0, 1) for x in (self.selected_GSE, self.gate_GSE))
        _, place_EGC = gate_EGS.detach().masked_fill(~selected_EGS, -math.inf).topk(capacity, dim=-1)
        filled_EGC = selected_EGS.gather(2, place_EGC)
        gate_EGC = gate_EGS.gather(2, place_EGC).masked_fill(~filled_EGC, 0.0)
        first_G1 = torch.arange(G, device=place_EGC.device)[:, None] * S
        wanted = self.selected_GSE.sum()
        common = _common(self)
        common["shares"] = {**self.shares, "capped_frac": (wanted - filled_EGC.sum(), wanted)}
        return Table(**common, index_EGC=place_EGC + first_G1, gate_EGC=gate_EGC, filled_EGC=filled_EGC)


@dataclass(frozen=True, kw_only=True)
class Rows(Assignment):
    """A varying number of rows per expert, as a list sorted by expert."""

    expert_R: Tensor
    """Ascending, int64."""
    index_R: Tensor
    """Row of the flattened (G * S, D) tokens, int64."""
    gate_R: Tensor
    """Combine weight, fp32."""

    def table(self) -> Table:
        """The same as one table of all groups, as wide as the busiest expert's rows; waits for the device. Empty slots
        point at token 0 with gate 0."""
        E = self.probability_GSE.shape[-1]
        first_E = torch.searchsorted(self.expert_R, torch.arange(E + 1, device=self.expert_R.device))
        width = max(int((first_E[1:] - first_E[:-1]).max()), 1)
        slot_R = (
            self.expert_R * width + torch.arange(len(self.expert_R), device=first_E.device) - first_E[self.expert_R]
        )
        index = self.index_R.new_zeros(E * width).scatter(0, slot_R, self.index_R)
        gate = self.gate_R.new_zeros(E * width).scatter(0, slot_R, self.gate_R)
        filled = torch.zeros(E * width, dtype=torch.bool, device=first_E.device).scatter(0, slot_R, True)
        index_EGC, gate_EGC, filled_EGC = (x.view(E, 1, width) for x in (index, gate, filled))
        return Table(**_common(self), index_EGC=index_EGC, gate_EGC=gate_EGC, filled_EGC=filled_EGC)


def _common(assignment: Assignment) -> dict:
    return {f.name: getattr(assignment, f.name) for f in dataclasses.fields(Assignment)}


def taken(assignment: Assignment) -> tuple[Tensor, Tensor, Tensor]:
    """(token, gate, 1 or 0) of every slot, flat: the last is 0 in empty slots. For a settled assignment."""
    if isinstance(assignment, Rows):
        return assignment.index_R, assignment.gate_R, torch.ones_like(assignment.index_R)
    assert isinstance(assignment, Table), "only a dispatcher's settled assignment says which rows there are"
    index = assignment.index_EGC.flatten()
    one = torch.ones_like(index) if assignment.filled_EGC is None else assignment.filled_EGC.flatten().to(torch.int64)
    return index, assignment.gate_EGC.flatten(), one


def expert_of_rows(assignment: Assignment) -> Tensor:
    """Whose each slot of `taken` is, int64."""
    if isinstance(assignment, Rows):
        return assignment.expert_R
    assert isinstance(assignment, Table)
    E = assignment.index_EGC.shape[0]
    return torch.arange(E, device=assignment.index_EGC.device).repeat_interleave(assignment.index_EGC[0].numel())


def chosen(assignment: Assignment) -> Tensor:
    """1.0 where an expert works on a token, else 0.0: (N, E) fp32. For a settled assignment; metrics only, nothing
    is computed from it."""
    N, E = assignment.probability_GSE.flatten(0, 1).shape
    index_R, _, one_R = taken(assignment)
    flat = torch.zeros(N * E, device=index_R.device)
    flat = flat.index_add(0, index_R * E + expert_of_rows(assignment), one_R.float())
    return flat.view(N, E).clamp(max=1.0)


def experts_per_token(assignment: Assignment) -> Tensor:
    """How many experts took each token: (G, S) int64. The sum over S is E * C for expert choice, by construction."""
    G, S, _ = assignment.probability_GSE.shape
    index, _, one = taken(assignment)
    return torch.zeros(G * S, dtype=torch.int64, device=index.device).index_add(0, index, one).view(G, S)

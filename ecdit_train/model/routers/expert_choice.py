"""Expert choice, the paper's router: every expert takes its C tokens of highest affinity in each group (paper eq. 6).

Legend: G routing groups, S tokens of a group, D hidden width, E experts, C capacity.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ecdit_train.config.schedule import ScheduledCapacity
from ecdit_train.config.slots import RouterSizes

from ..assignment import Table
from ..router import RouterInput, ScheduledRouter


@dataclass(frozen=True, kw_only=True)
class ExpertChoice(ScheduledCapacity):
    """Each expert takes its best C tokens of a group, so load is equal by construction and no balancing loss exists."""

    def build(self, sizes: RouterSizes) -> ExpertChoiceRouter:
        return ExpertChoiceRouter(sizes, config=self)


class ExpertChoiceRouter(ScheduledRouter):
    """Gates are the affinities themselves."""

    def forward(self, tokens: RouterInput) -> Table:
        G, S, _ = tokens.x_GSD.shape
        a_GSE = self.affinity(tokens)
        # Expert-major from the start, so that the gather writes the operand of the batched product directly.
        gate_EGC, index_EGC = a_GSE.permute(2, 0, 1).topk(self.capacity(S), dim=-1, sorted=False)
        first = torch.arange(G, device=a_GSE.device)[:, None] * S
        return Table(index_EGC=index_EGC + first, gate_EGC=gate_EGC, probability_GSE=a_GSE.detach())

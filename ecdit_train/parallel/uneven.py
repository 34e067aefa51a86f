"""The exchange of a varying number of rows: counts first, then an all-to-all of just those rows, by functional collectives.

Legend: P ranks that share the experts, E experts (e on each), D width, R rows of this rank sorted by expert (and so by the rank
that holds it), Q rows that arrive here, sorted by rank and expert, M rows of the busiest expert here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .collectives import all_to_all_rows


@dataclass(frozen=True, kw_only=True)
class Route:
    """Who sends how much to whom, and where the rows that arrive here belong."""

    sent: list[int]
    """Rows to each rank."""
    received: list[int]
    """Rows from each rank."""
    slot_Q: Tensor
    """Place of each row that arrives in the flattened (e, M) table of the experts here."""
    experts: int
    """e."""
    width: int
    """M, 1 at least, so that no product is empty."""


@dataclass(frozen=True, kw_only=True)
class UnevenExchange:
    """`group` is None where this rank holds all experts: rows are only arranged."""

    group: dist.ProcessGroup | None

    def plan(self, expert_R: Tensor, *, num_experts: int) -> Route:
        """Exchange counts. The only wait for the device: it alone knows them."""
        P = 1 if self.group is None else self.group.size()
        e, device = num_experts // P, expert_R.device
        first_E = torch.searchsorted(expert_R.contiguous(), torch.arange(num_experts + 1, device=device))
        sent_Pe = (first_E[1:] - first_E[:-1]).view(P, e)
        came_Pe = sent_Pe if self.group is None else all_to_all_rows(sent_Pe, [1] * P, [1] * P, self.group)
        sent, came = torch.stack([sent_Pe, came_Pe]).tolist()
        width = max(1, *(sum(column) for column in zip(*came, strict=True)))
        # Rows of rank p for expert j go behind those of the ranks before p.
        count = came_Pe.flatten()
        start_Pe = came_Pe.cumsum(0) - came_Pe + torch.arange(e, device=device) * width
        block_Q = torch.repeat_interleave(torch.arange(P * e, device=device), count, output_size=sum(map(sum, came)))
        before = count.cumsum(0) - count
        slot_Q = start_Pe.flatten()[block_Q] + torch.arange(len(block_Q), device=device) - before[block_Q]
        return Route(
            sent=[sum(row) for row in sent],
            received=[sum(row) for row in came],
            slot_Q=slot_Q,
            experts=e,
            width=width,
        )

    def send(self, rows_RD: Tensor, route: Route) -> Tensor:
        """(R, D) of this rank -> (e, M, D) of the experts here; places that nobody fills hold zeros."""
        if self.group is not None:
            rows_RD = all_to_all_rows(rows_RD, route.sent, route.received, self.group)
        table = rows_RD.new_zeros(route.experts * route.width, rows_RD.shape[1]).index_copy(0, route.slot_Q, rows_RD)
        return table.view(route.experts, route.width, -1)

    def send_back(self, y_eMD: Tensor, route: Route) -> Tensor:
        """(e, M, D) -> (R, D): the rows this rank sent, worked on."""
        rows_QD = y_eMD.flatten(0, 1).index_select(0, route.slot_Q)
        return rows_QD if self.group is None else all_to_all_rows(rows_QD, route.received, route.sent, self.group)

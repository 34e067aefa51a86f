"""The first leg of a node-aware all-to-all: rows meet, inside of each node, at the rank that takes them across.

Rank l of node n has a block of rows for every rank l' of every node n'. It gives rank l' of its own node all that goes to an
l', whatever the node; rank l' then has, from each of its node's ranks, the blocks for (n', l'). What follows is an all-to-all
among the ranks l' of all nodes, one message for each pair of nodes and local rank, as large as `local` flat ones:

    flat            each rank sends ep - local messages of 1/ep of its rows over the network
    hierarchical    ep/local - 1 messages of local/ep of its rows; before that, (local - 1)/local of them inside of the node

The same bytes leave the node, and the rows arrive in the same order, to the bit. The price is a second copy of all rows through
NVLink and memory: docs/decisions/0019.

Legend: N nodes, L ranks of each (N * L = ep), K rows that a rank sends to each, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .collectives import equal_split_op
from .recompute import INSIDE


def _flat(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    dist.all_to_all_single(out, x.contiguous(), group=group)
    return out


_inside = equal_split_op(INSIDE, _flat)


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """An ep group as nodes of equal size; ranks of a node follow each other in it."""

    inside: dist.ProcessGroup
    """The L ranks of this node."""
    across: dist.ProcessGroup
    """The N ranks with this one's place on their nodes."""

    def gather(self, x: Tensor) -> Tensor:
        """(N * L * K, ...), blocks by the rank they go to -> the same shape, blocks by the node they go to and, in each, by
        the local rank they come from: what an all-to-all `across` then leaves in the order of a flat exchange."""
        N, L = self.across.size(), self.inside.size()
        x_LN = x.unflatten(0, (N, L, -1)).transpose(0, 1).flatten(0, 2)
        return _inside(x_LN, self.inside.group_name).unflatten(0, (L, N, -1)).transpose(0, 1).flatten(0, 2)

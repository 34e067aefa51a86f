"""What data-parallel ranks tell each other outside the model: a few metrics, and their share of the sample pictures."""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from .mesh import Mesh


def reduce_over_dp(vector: Tensor, mesh: Mesh, *, op: Literal["mean", "max", "sum"]) -> Tensor:
    """A vector of scalars reduced over data-parallel ranks, the same on every rank. Collective."""
    if mesh.dp_group is None:
        return vector
    out = vector.clone()
    dist.all_reduce(out, op=dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM, group=mesh.dp_group)
    return out / mesh.dp_size if op == "mean" else out


def gather_over_dp(share: Tensor, mesh: Mesh) -> Tensor:
    """Equal shares of all data-parallel ranks, concatenated on dim 0 in rank order. Collective."""
    if mesh.dp_group is None:
        return share
    parts = [torch.empty_like(share) for _ in range(mesh.dp_size)]
    dist.all_gather(parts, share.contiguous(), group=mesh.dp_group)
    return torch.cat(parts)

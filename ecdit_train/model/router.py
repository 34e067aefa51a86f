"""What a router is. Implementations are in `routers/`, one file each with its configuration; how to add one: CONTRIBUTING.md.

Legend: G routing groups, S tokens of a group, D hidden width, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .assignment import Assignment


class Router(nn.Module):
    """Says which tokens each expert of a sparse layer works on.

    Parameters and buffers are made on the meta device and get their values afterwards: parameters are
    Xavier-uniform unless named in `constants`, buffers are written by `reset_buffers`. Both are saved, restored and
    placed on any layout. A router's parameters stay in fp32 whatever the compute precision is: a rounded logit
    changes who takes which token.
    """

    constants: ClassVar[Mapping[str, float]] = {}
    """Parameters that start at one value, by their names in the router."""

    def forward(self, x_GSD: Tensor) -> Assignment:
        """x: (G, S, D), the tokens of whole groups. Returns a `Table` where the number of rows is fixed, else a `Selection`.

        May be run twice for one step, so it writes nothing: what buffers need goes into `Assignment.observed`.
        """
        raise NotImplementedError

    def reset_buffers(self) -> None:
        """Write the first values of all buffers, in place."""
        if any(True for _ in self.buffers(recurse=False)):
            raise NotImplementedError(f"{type(self).__name__} has buffers and must define reset_buffers()")

    def update_buffers(self, observed: Mapping[str, Tensor]) -> None:
        """Once after every optimizer step: `Assignment.observed`, averaged over the step; the same numbers on all ranks."""

    def on_ranks(self, *, dp_group: dist.ProcessGroup | None) -> None:
        """Called once when the model is spread: a router that selects over the whole global batch keeps the
        group of the data-parallel ranks, whose tokens follow each other in rank order. None: this process
        sees the whole batch."""


class AffinityRouter(Router):
    """Affinity of tokens and experts, softmax over experts: A = softmax(x W_r) (paper eq. 5)."""

    def __init__(self, width: int, *, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, num_experts))

    def affinity(self, x_GSD: Tensor) -> Tensor:
        """(G, S, E) fp32."""
        with torch.autocast(x_GSD.device.type, enabled=False):
            dtype = torch.promote_types(x_GSD.dtype, torch.float32)
            return (x_GSD.to(dtype) @ self.weight.to(dtype)).softmax(dim=-1)


def whole_capacity(exact: float, *, tokens: int) -> int:
    """C as a Python int, at most all tokens of a group; the configuration's rules have checked that it is whole."""
    capacity = round(exact)
    assert capacity >= 1, f"capacity {exact} is below one token"
    assert abs(exact - capacity) < 1e-6, f"capacity {exact} is not whole"
    return min(capacity, tokens)

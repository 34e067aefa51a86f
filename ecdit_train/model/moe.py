"""The sparse feed-forward: router, dispatcher and experts are siblings, so that a distributed dispatcher can take the
local one's place without the others knowing.

Legend: B images, S tokens per image, N = B * S tokens, G routing pools of P tokens (N = G * P), D hidden width, H
expert hidden width, E experts (e on this rank), C capacity, R rows that reach an expert.

Dataflow, all index based: `index_select` writes the operand of a batched product over stacked expert weights directly,
and `index_add` sums the weighted results. A one-hot dispatch (the paper's Algorithm 1) costs 1.4 to 2 times as much,
and indexing stacked weights by `W[e]` in a loop allocates a full-size zero gradient per expert.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .router import Assignment, Router


class Experts(nn.Module):
    """e two-layer feed-forwards without biases, stacked: E_i(x) = GELU(x W1_i) W2_i."""

    def __init__(self, width: int, *, hidden: int, experts: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(experts, width, hidden))
        self.down = nn.Parameter(torch.empty(experts, hidden, width))

    def forward(self, x_eRD: Tensor) -> Tensor:
        """(e, R, D) -> (e, R, D)."""
        h_eRH = F.gelu(torch.bmm(x_eRD, self.up), approximate="tanh")
        return torch.bmm(h_eRH, self.down)


class Dispatcher(Protocol):
    """Brings tokens to their experts and back. Gates and indices stay where they were made."""

    def dispatch(self, x_ND: Tensor, assignment: Assignment) -> Tensor:
        """(N, D) -> (e, R, D): the rows of the experts on this rank."""
        ...

    def combine(self, y_eRD: Tensor, assignment: Assignment, *, num_tokens: int) -> Tensor:
        """(e, R, D) -> (N, D): sum over experts of gate * row (paper eq. 8); tokens nobody chose get 0."""
        ...


class LocalDispatcher:
    """All experts on this device."""

    def dispatch(self, x_ND: Tensor, assignment: Assignment) -> Tensor:
        E = assignment.index_EGC.shape[0]
        return x_ND.index_select(0, assignment.index_EGC.flatten()).view(E, -1, x_ND.shape[1])

    def combine(self, y_eRD: Tensor, assignment: Assignment, *, num_tokens: int) -> Tensor:
        weighted = y_eRD.flatten(0, 1) * assignment.gate_EGC.flatten()[:, None].to(y_eRD.dtype)
        # In place: index_add would copy the zeros first.
        return y_eRD.new_zeros(num_tokens, y_eRD.shape[-1]).index_add_(0, assignment.index_EGC.flatten(), weighted)


class _SegmentSum(torch.autograd.Function):
    """Rows summed by target in one fixed order: rows (R, D), target (R,) -> (N, D). Its gradient is a plain gather."""

    @staticmethod
    def forward(ctx, rows_RD: Tensor, target_R: Tensor, num: int) -> Tensor:
        ctx.save_for_backward(target_R)
        target, order = target_R.sort(stable=True)
        # Not bincount, which waits for the device to size its answer.
        offsets = torch.searchsorted(target, torch.arange(num + 1, device=target.device))
        return torch.segment_reduce(rows_RD.index_select(0, order), "sum", offsets=offsets, initial=0.0, unsafe=True)

    @staticmethod
    def backward(ctx, grad_ND: Tensor) -> tuple[Tensor, None, None]:
        (target_R,) = ctx.saved_tensors
        return grad_ND.index_select(0, target_R), None, None


class _Gather(torch.autograd.Function):
    """index_select whose gradient is summed in one fixed order."""

    @staticmethod
    def forward(ctx, x_ND: Tensor, index_R: Tensor) -> Tensor:
        ctx.save_for_backward(index_R)
        ctx.num = x_ND.shape[0]
        return x_ND.index_select(0, index_R)

    @staticmethod
    def backward(ctx, grad_RD: Tensor) -> tuple[Tensor, None]:
        (index_R,) = ctx.saved_tensors
        return _SegmentSum.apply(grad_RD, index_R, ctx.num), None


class DeterministicDispatcher:
    """LocalDispatcher without atomics: bitwise reproducible on CUDA, at the price of one stable sort each way."""

    def dispatch(self, x_ND: Tensor, assignment: Assignment) -> Tensor:
        E = assignment.index_EGC.shape[0]
        return _Gather.apply(x_ND, assignment.index_EGC.flatten()).view(E, -1, x_ND.shape[1])

    def combine(self, y_eRD: Tensor, assignment: Assignment, *, num_tokens: int) -> Tensor:
        weighted = y_eRD.flatten(0, 1) * assignment.gate_EGC.flatten()[:, None].to(y_eRD.dtype)
        return _SegmentSum.apply(weighted, assignment.index_EGC.flatten(), num_tokens)


class MoE(nn.Module):
    """Sparse feed-forward over routing pools of consecutive tokens."""

    def __init__(self, router: Router, experts: Experts, *, dispatcher: Dispatcher) -> None:
        super().__init__()
        self.router = router
        self.experts = experts
        self.dispatcher = dispatcher

    def forward(self, x_BSD: Tensor, *, pool: int) -> tuple[Tensor, Assignment]:
        """x: (B, S, D), `pool` tokens compete for each expert (B * S must be whole pools). Returns (B, S, D) and who
        took what."""
        B, S, D = x_BSD.shape
        assert (B * S) % pool == 0, f"{B} x {S} tokens are not whole pools of {pool}"
        assignment = self.router(x_BSD.reshape(-1, pool, D))
        rows_eRD = self.dispatcher.dispatch(x_BSD.reshape(-1, D), assignment)
        y_ND = self.dispatcher.combine(self.experts(rows_eRD), assignment, num_tokens=B * S)
        return y_ND.view(B, S, D), assignment

"""Token rows to experts and back: gather, and the sum by token in one fixed order, each the other's gradient.

Legend: N tokens, R rows (one token at one expert), D width.

Bytes moved, in units of D values (r = R / N rows per token): a gather reads and writes each row (2 r N). The sum reads
each row and writes each token ((r + 1) N) and keeps its accumulator in registers; index_add reads and writes its target
for every row instead (with the zeros, 3 r + 1), by atomics. Both directions of the weighted sum are one pass: its
backward reads a token's gradient once for the row's gradient and the gate's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .language import constexpr, jit, next_power_of_2, runs, tl

WIDEST = 1024
"""Values of a row that a program holds at once."""


@dataclass(frozen=True, kw_only=True)
class RowLists:
    """Which rows belong to a token: those of token n are `order_R[start[n]:start[n + 1]]`, ascending."""

    order_R: Tensor
    """int64."""
    start_N1: Tensor
    """(N + 1,) int64."""

    @property
    def num_tokens(self) -> int:
        return self.start_N1.shape[0] - 1


def list_rows(index_R: Tensor, *, num_tokens: int) -> RowLists:
    """The inverse of `index_R` (the token of each row) by one stable sort: make it once for a layer, its combine and
    the gradient of its gather need the same. Nothing waits for the device."""
    # 32 bits: CUDA's radix sort takes half the passes.
    token_R, order_R = index_R.to(torch.int32).sort(stable=True)
    ends = torch.arange(num_tokens + 1, device=index_R.device, dtype=torch.int32)
    return RowLists(order_R=order_R, start_N1=torch.searchsorted(token_R, ends))


def gather_rows(x_ND: Tensor, index_R: Tensor, *, gate_R: Tensor | None = None) -> Tensor:
    """(N, D), (R,) -> (R, D): the rows of the tokens named, times their gates where given (the product in fp32 at least, rounded
    once). No gradient of its own."""
    if not runs(x_ND):
        return gather_rows_twin(x_ND, index_R, gate_R=gate_R)
    return _gather(x_ND.contiguous(), index_R.contiguous(), None if gate_R is None else gate_R.contiguous())


def gather_rows_twin(x_ND: Tensor, index_R: Tensor, *, gate_R: Tensor | None = None) -> Tensor:
    rows_RD = x_ND.index_select(0, index_R)
    return rows_RD if gate_R is None else (rows_RD * gate_R[:, None]).to(x_ND.dtype)


def sum_rows(rows_RD: Tensor, lists: RowLists, *, gate_R: Tensor | None = None) -> Tensor:
    """(R, D) -> (N, D): rows, times their gates where given, summed by token in the order of the rows with an
    accumulator of fp32 at least; tokens without rows get 0. Bitwise reproducible. No gradient of its own."""
    if not runs(rows_RD):
        return sum_rows_twin(rows_RD, lists, gate_R=gate_R)
    return _sum(rows_RD.contiguous(), lists.order_R, lists.start_N1, None if gate_R is None else gate_R.contiguous())


def sum_rows_twin(rows_RD: Tensor, lists: RowLists, *, gate_R: Tensor | None = None) -> Tensor:
    sorted_RD = rows_RD.index_select(0, lists.order_R)
    accumulate = torch.promote_types(rows_RD.dtype, torch.float32)
    sorted_RD = sorted_RD.to(accumulate)
    if gate_R is not None:
        sorted_RD = sorted_RD * gate_R.index_select(0, lists.order_R)[:, None].to(accumulate)
    summed = torch.segment_reduce(sorted_RD, "sum", offsets=lists.start_N1, initial=0.0, unsafe=True)
    return summed.to(rows_RD.dtype)


def weigh_backward(grad_ND: Tensor, rows_RD: Tensor, index_R: Tensor, *, gate_R: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `sum_rows` with gates, (N, D), (R, D) -> (R, D), (R,): gate * grad[token] and <grad[token], row>."""
    if not runs(rows_RD):
        return weigh_backward_twin(grad_ND, rows_RD, index_R, gate_R=gate_R)
    tensors = (grad_ND, rows_RD, index_R, gate_R)
    return _gather_and_dot(*(x.contiguous() for x in tensors))


def weigh_backward_twin(grad_ND: Tensor, rows_RD: Tensor, index_R: Tensor, *, gate_R: Tensor) -> tuple[Tensor, Tensor]:
    accumulate = torch.promote_types(rows_RD.dtype, torch.float32)
    taken_RD = grad_ND.index_select(0, index_R).to(accumulate)
    dot_R = (taken_RD * rows_RD.to(accumulate)).sum(-1)
    return (taken_RD * gate_R[:, None].to(accumulate)).to(rows_RD.dtype), dot_R.to(gate_R.dtype)


class Gather(torch.autograd.Function):
    """`apply(x_ND, index_R, lists or None)`: index_select, whose gradient sums rows by token in one fixed order."""

    @staticmethod
    def forward(ctx, x_ND: Tensor, index_R: Tensor, lists: RowLists | None = None) -> Tensor:
        tensors = () if lists is None else (lists.order_R, lists.start_N1)
        ctx.save_for_backward(index_R, *tensors)
        ctx.num_tokens = x_ND.shape[0]
        return gather_rows(x_ND, index_R)

    @staticmethod
    def backward(ctx, grad_RD: Tensor) -> tuple[Tensor, None, None]:
        index_R, *saved = ctx.saved_tensors
        lists = (
            RowLists(order_R=saved[0], start_N1=saved[1]) if saved else list_rows(index_R, num_tokens=ctx.num_tokens)
        )
        return sum_rows(grad_RD, lists), None, None


class Weigh(torch.autograd.Function):
    """`apply(rows_RD, gate_R, index_R, lists)`: `sum_rows` with gates, differentiable in both."""

    @staticmethod
    def forward(ctx, rows_RD: Tensor, gate_R: Tensor, index_R: Tensor, lists: RowLists) -> Tensor:
        ctx.save_for_backward(rows_RD, gate_R, index_R)
        return sum_rows(rows_RD, lists, gate_R=gate_R)

    @staticmethod
    def backward(ctx, grad_ND: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows_RD, gate_R, index_R = ctx.saved_tensors
        return *weigh_backward(grad_ND, rows_RD, index_R, gate_R=gate_R), None, None


class Sum(torch.autograd.Function):
    """`apply(rows_RD, index_R, lists)`: `sum_rows` without gates; its gradient is a gather."""

    @staticmethod
    def forward(ctx, rows_RD: Tensor, index_R: Tensor, lists: RowLists) -> Tensor:
        ctx.save_for_backward(index_R)
        return sum_rows(rows_RD, lists)

    @staticmethod
    def backward(ctx, grad_ND: Tensor) -> tuple[Tensor, None, None]:
        (index_R,) = ctx.saved_tensors
        return gather_rows(grad_ND, index_R), None, None


def _block(D: int) -> int:
    return min(next_power_of_2(max(D, 16)), WIDEST)


def _grid(rows: int, D: int) -> tuple[int, int]:
    return rows, -(-D // _block(D))


@torch.library.custom_op("ecdit::gather_rows", mutates_args=())
def _gather(x_ND: Tensor, index_R: Tensor, gate_R: Tensor | None) -> Tensor:
    (R,), D = index_R.shape, x_ND.shape[1]
    out_RD = x_ND.new_empty(R, D)
    if out_RD.numel():
        gate = index_R if gate_R is None else gate_R
        _gather_kernel[_grid(R, D)](x_ND, index_R, gate, out_RD, D, GATED=gate_R is not None, BLOCK=_block(D))
    return out_RD


@_gather.register_fake
def _(x_ND: Tensor, index_R: Tensor, gate_R: Tensor | None) -> Tensor:
    return x_ND.new_empty(index_R.shape[0], x_ND.shape[1])


@torch.library.custom_op("ecdit::sum_rows", mutates_args=())
def _sum(rows_RD: Tensor, order_R: Tensor, start_N1: Tensor, gate_R: Tensor | None) -> Tensor:
    N, D = start_N1.shape[0] - 1, rows_RD.shape[1]
    out_ND = rows_RD.new_empty(N, D)
    if out_ND.numel():
        gate = order_R if gate_R is None else gate_R
        _sum_kernel[_grid(N, D)](rows_RD, order_R, start_N1, gate, out_ND, D, GATED=gate_R is not None, BLOCK=_block(D))
    return out_ND


@_sum.register_fake
def _(rows_RD: Tensor, order_R: Tensor, start_N1: Tensor, gate_R: Tensor | None) -> Tensor:
    return rows_RD.new_empty(start_N1.shape[0] - 1, rows_RD.shape[1])


@torch.library.custom_op("ecdit::gather_and_dot", mutates_args=())
def _gather_and_dot(grad_ND: Tensor, rows_RD: Tensor, index_R: Tensor, gate_R: Tensor) -> tuple[Tensor, Tensor]:
    R, D = rows_RD.shape
    out_RD, dot_R = torch.empty_like(rows_RD), gate_R.new_zeros(R)
    if out_RD.numel():
        _gather_and_dot_kernel[(R,)](grad_ND, rows_RD, index_R, gate_R, out_RD, dot_R, D, BLOCK=_block(D))
    return out_RD, dot_R


@_gather_and_dot.register_fake
def _(grad_ND: Tensor, rows_RD: Tensor, index_R: Tensor, gate_R: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rows_RD), torch.empty_like(gate_R)


# Rows and widths are multiplied in int64: a tensor of 2^31 values is 131,072 rows of 16,384.


@jit
def _gather_kernel(x, index, gate, out, D, GATED: constexpr, BLOCK: constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < D
    value = tl.load(x + tl.load(index + row) * D + cols, mask=inside)
    if GATED:
        value = value.to(tl.float32) * tl.load(gate + row).to(tl.float32)
    tl.store(out + row * D + cols, value.to(out.dtype.element_ty), mask=inside)


@jit
def _sum_kernel(rows, order, start, gate, out, D, GATED: constexpr, BLOCK: constexpr):  # type: ignore[no-untyped-def]
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < D
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for place in range(tl.load(start + token), tl.load(start + token + 1)):
        row = tl.load(order + place)
        value = tl.load(rows + row * D + cols, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            value = value * tl.load(gate + row).to(tl.float32)
        total += value
    tl.store(out + token * D + cols, total.to(out.dtype.element_ty), mask=inside)


@jit
def _gather_and_dot_kernel(grad, rows, index, gate, out, dot, D, BLOCK: constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    token, weight = tl.load(index + row), tl.load(gate + row).to(tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, D, BLOCK):
        cols = first + tl.arange(0, BLOCK)
        inside = cols < D
        taken = tl.load(grad + token * D + cols, mask=inside, other=0.0).to(tl.float32)
        total += taken * tl.load(rows + row * D + cols, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + row * D + cols, (taken * weight).to(out.dtype.element_ty), mask=inside)
    tl.store(dot + row, tl.sum(total, axis=0).to(dot.dtype.element_ty))

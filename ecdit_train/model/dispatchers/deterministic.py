"""Gather and sum in one fixed order: bitwise reproducible on CUDA, at the price of one stable sort each way.

Legend: N tokens, R rows (one token at one expert), D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ecdit_train.config.slots import DispatcherConfig

from ..moe import Dispatcher


@dataclass(frozen=True, kw_only=True)
class Deterministic(DispatcherConfig):
    """Sums in a fixed order, without atomics."""

    same_result: ClassVar[bool] = True

    def build(self) -> DeterministicDispatcher:
        return DeterministicDispatcher(cap=self.cap)


class DeterministicDispatcher(Dispatcher):
    def gather(self, x_ND: Tensor, index_R: Tensor) -> Tensor:
        return _Gather.apply(x_ND, index_R)

    def sum(self, rows_RD: Tensor, index_R: Tensor, *, num_tokens: int) -> Tensor:
        return _SegmentSum.apply(rows_RD, index_R, num_tokens)


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

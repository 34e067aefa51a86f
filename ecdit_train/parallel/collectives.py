"""Differentiable collectives: the conjugate pair of tensor parallelism, and an all-to-all that can stay in flight.

All of them are torch's functional collectives: they return new tensors (an activation saved for backward is never
written over), torch.compile keeps them in its graph, and selective checkpointing can tell which results to keep.
Megatron's own pair is not used: its `_reduce` all-reduces `x.contiguous()` and returns `x`, so a non-contiguous
tensor silently stays unreduced (tests/dist/test_dist_quirks.py).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives  # registers the ops
from torch import Tensor

_ops = torch.ops._c10d_functional


def _all_reduce(x: Tensor, group_name: str) -> Tensor:
    return _ops.wait_tensor(_ops.all_reduce(x.contiguous(), "sum", group_name))


class _CopyToGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group_name: str) -> Tensor:
        ctx.group_name = group_name
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(grad, ctx.group_name), None


class _SumOverGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group_name: str) -> Tensor:
        return _all_reduce(x, group_name)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def copy_to_group(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The same tensor on all ranks enters a region where each does part of the work: identity, gradients are summed."""
    return x if group is None else _CopyToGroup.apply(x, group.group_name)


def sum_over_group(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Partial results leave that region: summed, the gradient is handed to every rank as it is."""
    return x if group is None else _SumOverGroup.apply(x, group.group_name)


def _start(x: Tensor, group_name: str, size: int) -> Tensor:
    splits = [x.shape[0] // size] * size
    return _ops.all_to_all_single(x.contiguous(), splits, splits, group_name)


class _AllToAllStart(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group_name: str, size: int) -> Tensor:
        return _start(x, group_name, size)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return _ops.wait_tensor(grad), None, None


class _AllToAllWait(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group_name: str, size: int) -> Tensor:
        ctx.group_name, ctx.size = group_name, size
        return _ops.wait_tensor(x).view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return _start(grad, ctx.group_name, ctx.size), None, None


def all_to_all_start(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Begin an equal-split all-to-all over dim 0. The result may only be given to `all_to_all_wait`.

    The pair is its own mirror image: in backward the wait starts the gradient's exchange and the start waits for it, so
    what runs between the two hides the traffic in both directions.
    """
    return _AllToAllStart.apply(x, group.group_name, group.size())


def all_to_all_wait(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Wait for `all_to_all_start`; on CUDA the stream waits, not the host."""
    return _AllToAllWait.apply(x, group.group_name, group.size())


class _AllToAllRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, sent: list[int], received: list[int], group_name: str) -> Tensor:
        ctx.sent, ctx.received, ctx.group_name = sent, received, group_name
        return _ops.wait_tensor(_ops.all_to_all_single(x.contiguous(), received, sent, group_name))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        back = _ops.all_to_all_single(grad.contiguous(), ctx.sent, ctx.received, ctx.group_name)
        return _ops.wait_tensor(back), None, None, None


def all_to_all_rows(x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    """All-to-all over dim 0 with as many rows to and from each rank as the lists say (0 is fine)."""
    return _AllToAllRows.apply(x, sent, received, group.group_name)


def equal_split_op(
    name: str, exchange: Callable[[Tensor, dist.ProcessGroup], Tensor]
) -> Callable[[Tensor, str], Tensor]:
    """`exchange`, an equal-split all-to-all over dim 0, as a torch op: (x, name of the group) -> the same shape, its own
    gradient. By a name of its own, so that torch.compile keeps it in the graph and recomputation can tell whether to repeat it."""

    @torch.library.custom_op(name, mutates_args=())
    def op(x: Tensor, group_name: str) -> Tensor:
        return exchange(x, dist.distributed_c10d._resolve_process_group(group_name))  # type: ignore[arg-type]

    @op.register_fake
    def _(x: Tensor, group_name: str) -> Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    def keep_group(ctx, inputs: tuple[Tensor, str], output: Tensor) -> None:
        ctx.group_name = inputs[1]

    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return op(grad, ctx.group_name), None

    op.register_autograd(backward, setup_context=keep_group)
    return op

"""Elementwise updates, a block at a time, that a value on the device makes or refuses.

A rule that runs over all parameters at once holds a temporary as large as the shard (torch's foreach RMSProp: fp32 roots of
every mean square). Here it is as large as a block, weight decay and the moving average are done while the block is in cache,
and small tensors share a block. A block's numbers are those of the whole tensor, bit for bit: every operation is elementwise.

The device decides as torch's `GradScaler` has it: an optimizer with `_step_supports_amp_scaling` reads `found_inf`, and one that
is not 0 leaves every bit as it was. The host does not wait to know.

Legend: p parameter, g gradient; all tensors of a block are flat.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ecdit_train.parallel.placement import local

ELEMENTS = {"cpu": 1 << 16, "cuda": 1 << 24}
"""Elements of a block by device: what a core's cache holds; on a GPU, few launches for many bytes (64 MiB of fp32)."""

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By bytes of a float."""


@dataclass(frozen=True, kw_only=True)
class Average:
    """The moving average that is updated with the weights: average <- average + weight (p - average)."""

    shadow: Mapping[nn.Parameter, Tensor]
    weight: float


@dataclass(frozen=True, kw_only=True)
class Block:
    """Flat pieces of some tensors of one dtype; `values` in the order parameter, state, moving average."""

    values: list[Tensor]
    grad: Tensor | None
    """None: the parameter took no part in this step."""
    group: Mapping[str, Any]
    """Of the optimizer."""
    step: float
    """Updates, this one included, where the rule counts them."""


class BlockOptimizer(torch.optim.Optimizer):
    """Write `rule`; `states` names what it keeps beside "step", as torch's optimizer of that name does."""

    _step_supports_amp_scaling = True
    states: tuple[str, ...] = ()
    counts = False
    """Whether the rule reads how many updates were made."""

    def __init__(self, groups: Sequence[Mapping[str, Any]], *, lr: float) -> None:
        super().__init__([dict(group) for group in groups], {"lr": lr})
        self.found_inf: Tensor | None = None
        """0-dim, on the parameters' device: anything but 0 refuses the update. None: it is made."""
        self.average: Average | None = None
        """Updated in the same pass."""

    def rule(self, p: Tensor, g: Tensor | None, *state: Tensor, group: Mapping[str, Any], step: float) -> list[Tensor]:
        """The new parameter and state, in new tensors. Elementwise; g None: what happens without a gradient."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None, "the training step computes gradients itself"
        choice = None if self.found_inf is None else Choice(self.found_inf)
        for block in self._blocks():
            old = block.values[: 1 + len(self.states)]
            new = self.rule(old[0], block.grad, *old[1:], group=block.group, step=block.step)
            if len(block.values) > len(old):
                assert self.average is not None
                new.append(block.values[-1].lerp(new[0], self.average.weight))
            for before, after in zip(block.values, new, strict=True):
                if after is before:
                    continue
                if choice is None:
                    before.copy_(after)
                else:
                    choice.write(after, into=before)

    def _blocks(self) -> Iterator[Block]:
        """Large tensors in slices; small ones joined, and given back what became of them."""
        for group in self.param_groups:
            joined: dict[Any, list[tuple[list[Tensor], Tensor | None]]] = {}
            for p in group["params"]:
                state = self.state[p]
                if p.grad is not None:
                    state["step"] += 1
                shadow = [] if self.average is None else [self.average.shadow[p]]
                values = _flat([p, *(state[name] for name in self.states), *shadow])
                assert values[0].numel() == 0 or values[0].data_ptr() == local(p.detach()).data_ptr(), (
                    "a copy, not a view"
                )
                grad = None if p.grad is None else _flat([p, p.grad])[1]
                step = float(state["step"]) if self.counts else 0.0
                if values[0].numel() <= elements(values[0].device) // 8:
                    joined.setdefault((values[0].device, values[0].dtype, grad is None, step), []).append(
                        (values, grad)
                    )
                    continue
                for cut in _cuts(values[0]):
                    part = None if grad is None else grad[cut]
                    yield Block(values=[v[cut] for v in values], grad=part, group=group, step=step)
            for (*_, step), some in joined.items():
                yield from _together(some, group=group, step=step)


class Choice:
    """Between two values, by a value that only the device knows."""

    def __init__(self, refuse: Tensor) -> None:
        """`refuse`: 0-dim; anything but 0 keeps what is there."""
        self._refuse = refuse != 0
        self._masks: dict[torch.dtype, Tensor] = {}

    def write(self, after: Tensor, *, into: Tensor) -> None:
        """`after` over `into`, or nothing; bits, so NaN is as good as any. May spoil `after`."""
        if into.device.type != "cpu":
            torch.where(self._refuse, into, after, out=into)
            return
        # torch.where with one condition for all is not vectorized on CPU; three operations on bits are four times as fast.
        kind = BITS[into.element_size()]
        if kind not in self._masks:
            self._masks[kind] = self._refuse.to(kind) - 1
        old, new = into.view(kind), after.view(kind)
        old.bitwise_xor_(new.bitwise_xor_(old).bitwise_and_(self._masks[kind]))


def _together(
    some: Sequence[tuple[list[Tensor], Tensor | None]], *, group: Mapping[str, Any], step: float
) -> Iterator[Block]:
    """Small tensors as blocks of at most the block's size; after each block its values go back to where they came from."""
    size = elements(some[0][0][0].device)
    start, filled = 0, 0
    for end in range(len(some) + 1):
        if end < len(some) and (filled + some[end][0][0].numel() <= size or end == start):
            filled += some[end][0][0].numel()
            continue
        part = some[start:end]
        values = [torch.cat(tensors) for tensors in zip(*(values for values, _ in part), strict=True)]
        grads = [g for _, g in part if g is not None]
        yield Block(values=values, grad=torch.cat(grads) if grads else None, group=group, step=step)
        sizes = [values[0].numel() for values, _ in part]
        for n, value in enumerate(values):
            torch._foreach_copy_([v[n] for v, _ in part], list(value.split(sizes)))
        if end < len(some):
            start, filled = end, some[end][0][0].numel()


def blocks_of(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors that lie alike, cut into blocks together; views of this rank's shards."""
    flat = _flat(tensors)
    for cut in _cuts(flat[0]):
        yield [t[cut] for t in flat]


def elements(device: torch.device) -> int:
    """Of a block."""
    return ELEMENTS.get(device.type, ELEMENTS["cuda"])


def _cuts(flat: Tensor) -> Iterator[slice]:
    size = elements(flat.device)
    return (slice(start, start + size) for start in range(0, flat.numel(), size))


def _flat(tensors: Sequence[Tensor]) -> list[Tensor]:
    """This rank's shards as rows, elements in the order in which the first one lies in memory; views of all that lie like it."""
    shards = [local(t.detach()) for t in tensors]
    strides = shards[0].stride()
    order = sorted(range(len(strides)), key=lambda dim: -strides[dim])
    return [shard.permute(order).reshape(-1) for shard in shards]

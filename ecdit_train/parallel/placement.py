"""Where the part of a parameter that this rank holds lies in the global tensor.

Two cuts are composed. The first is known only here (ParamPlacement: tensor and expert parallelism, which torch does
not see); the second is FSDP2's, read off the DTensor:

    global tensor --(ParamPlacement)--> the module's part --(DTensor)--> this rank's shard
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

Kind = Literal["replicated", "column", "row", "expert"]


@dataclass(frozen=True, kw_only=True)
class ParamPlacement:
    """The module's part is chunk `index` of `count` along `dim` of the global tensor, or the stretches in `boxes`."""

    global_shape: tuple[int, ...]
    dim: int = 0
    index: int = 0
    count: int = 1
    """1: the module holds the whole tensor."""
    boxes: tuple[tuple[int, int, int], ...] = ()
    """(global offset, local offset, size) along `dim`, in local order; takes the place of index and count. Used where
    kv heads are repeated because tp > kv heads."""
    kind: Kind = "replicated"
    replicas: int = 1
    """Ranks of the tp group that hold these very values: tp if replicated, 1 if split, tp / kv_heads for repeated kv
    heads. Experts are folded over tp and never repeated."""
    first_replica: bool = True
    """True on one rank of each set of replicas."""

    def runs(self) -> tuple[tuple[int, int, int], ...]:
        """(global offset, local offset, size) along `dim`."""
        if self.boxes:
            return self.boxes
        size = self.global_shape[self.dim] // self.count
        return ((self.index * size, 0, size),)


@dataclass(frozen=True, kw_only=True)
class LocalBox:
    """One box of the global tensor, and where it starts in this rank's local tensor."""

    offsets: tuple[int, ...]
    local_offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def of_global(self, tensor: Tensor) -> Tensor:
        """View of the box inside the global tensor."""
        return _narrow(tensor, self.offsets, self.sizes)

    def of_local(self, tensor: Tensor) -> Tensor:
        """View of the box inside this rank's local tensor."""
        return _narrow(tensor, self.local_offsets, self.sizes)


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_boxes(tensor: Tensor, placement: ParamPlacement) -> list[LocalBox]:
    """Boxes of the global tensor that this rank's shard holds; none if FSDP gave it an empty shard."""
    if tensor.dim() == 0:
        return [LocalBox(offsets=(), local_offsets=(), sizes=())]
    part_offsets, part_sizes = [0] * tensor.dim(), list(tensor.shape)
    if isinstance(tensor, DTensor):
        mesh, coordinate = tensor.device_mesh, tensor.device_mesh.get_coordinate()
        assert coordinate is not None
        for axis, how in enumerate(tensor.placements):
            if isinstance(how, Shard):
                # FSDP2 cuts like torch.chunk: ceil(n / count) each, the last ones shorter or empty.
                chunk = -(-tensor.shape[how.dim] // mesh.size(axis))
                start = min(coordinate[axis] * chunk, tensor.shape[how.dim])
                part_offsets[how.dim] = start
                part_sizes[how.dim] = min(chunk, tensor.shape[how.dim] - start)
    if 0 in part_sizes:
        return []
    boxes, dim = [], placement.dim
    low, high = part_offsets[dim], part_offsets[dim] + part_sizes[dim]
    for global_start, local_start, size in placement.runs():
        start, stop = max(low, local_start), min(high, local_start + size)
        if start < stop:
            offsets, inside, sizes = list(part_offsets), [0] * tensor.dim(), list(part_sizes)
            offsets[dim], inside[dim], sizes[dim] = global_start + start - local_start, start - low, stop - start
            boxes.append(LocalBox(offsets=tuple(offsets), local_offsets=tuple(inside), sizes=tuple(sizes)))
    return boxes


def holds_first_copy(tensor: Tensor, placement: ParamPlacement) -> bool:
    """True on exactly one of the ranks that hold the same values (tp replicas, hybrid-sharding replicas)."""
    if not placement.first_replica:
        return False
    if isinstance(tensor, DTensor):
        coordinate = tensor.device_mesh.get_coordinate()
        assert coordinate is not None
        return all(coordinate[axis] == 0 for axis, how in enumerate(tensor.placements) if not isinstance(how, Shard))
    return True


def _narrow(tensor: Tensor, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
    for dim, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
        tensor = tensor.narrow(dim, offset, size)
    return tensor

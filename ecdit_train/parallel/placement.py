"""Where the part of a parameter that this rank holds lies in the global tensor.

Two cuts are composed. The first is known only here (ParamPlacement: tensor and expert parallelism, which torch does
not see); the second is FSDP2's, read off the DTensor:

    global tensor --(ParamPlacement)--> the module's part --(DTensor)--> this rank's shard

A dimension is described by *runs*, stretches that are contiguous both in the global tensor and in the local one. A cut
selects intervals of runs; a rank's boxes are the product of the runs of all dimensions. Column (dim 0 twice), row
(dim 1, then dim 0), experts, HSDP replicas, strided shards and repeated kv heads are all this one composition.

FSDP2 follows `torch.chunk`: the pieces are ceil(n / count) long, the last ones shorter or empty.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from .degrees import Degrees, Kind


@dataclass(frozen=True, slots=True)
class Run:
    """`size` positions of one dimension: global `start ...` are local `local ...`."""

    start: int
    local: int
    size: int


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

    def runs(self) -> list[Run]:
        """The module's part along `dim`. Raises ValueError if it cannot be."""
        length = self.global_shape[self.dim]
        if not self.boxes:
            if not 0 <= self.index < self.count:
                raise ValueError(f"chunk index {self.index} is not in 0..{self.count - 1}")
            start, stop = chunk_bounds(length, index=self.index, count=self.count)
            return [Run(start, 0, stop - start)] if stop > start else []
        cursor = 0
        for start, local, size in self.boxes:
            if local != cursor or size <= 0 or start < 0 or start + size > length:
                raise ValueError(
                    f"box (global {start}, local {local}, size {size}) must follow local {cursor} and stay in {length}"
                )
            cursor += size
        return [Run(*box) for box in self.boxes]


@dataclass(frozen=True, order=True, slots=True)
class Box:
    """An axis-aligned part of a global tensor: elements `offset[d] <= index[d] < offset[d] + size[d]`."""

    offset: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def volume(self) -> int:
        """Number of elements (1 for a 0-d tensor)."""
        return math.prod(self.size)

    def meet(self, other: Box) -> Box | None:
        """The common part of two boxes of one tensor, or None."""
        low = tuple(map(max, self.offset, other.offset))
        high = (min(a + m, b + n) for a, m, b, n in zip(self.offset, self.size, other.offset, other.size, strict=True))
        size = tuple(h - lo for h, lo in zip(high, low, strict=True))
        return Box(low, size) if all(n > 0 for n in size) else None

    def of(self, tensor: Tensor) -> Tensor:
        """The view of this box inside the global tensor."""
        return _narrow(tensor, self.offset, self.size)

    def within(self, view: Tensor, part: Box) -> Tensor:
        """The view of `part` inside `view`, where `view` holds this box. No copy."""
        return _narrow(view, [start - base for start, base in zip(part.offset, self.offset, strict=True)], part.size)

    def __str__(self) -> str:
        return "[" + ", ".join(f"{o}:{o + n}" for o, n in zip(self.offset, self.size, strict=True)) + "]"


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A box of the global tensor and the view of this rank's memory that holds it (shape == box.size)."""

    box: Box
    view: Tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def pieces(tensor: Tensor, placement: ParamPlacement | None = None) -> list[Piece]:
    """Boxes of the global tensor that this rank's shard holds; none if FSDP gave it an empty shard. Raises ValueError.

    Without a placement the DTensor's own shape is the global one. Views are detached and share memory with `tensor`.
    """
    if not isinstance(tensor, DTensor):
        return pieces_of(tensor, part_shape=tuple(tensor.shape), placement=placement)
    with torch.no_grad():
        shard = tensor.to_local()
    coordinate = tensor.device_mesh.get_coordinate()
    return pieces_of(
        shard,
        part_shape=tuple(tensor.shape),
        mesh_shape=tuple(tensor.device_mesh.shape),
        coordinate=None if coordinate is None else tuple(coordinate),
        placements=tensor.placements,
        placement=placement,
    )


def pieces_of(
    local: Tensor,
    *,
    part_shape: Sequence[int],
    mesh_shape: Sequence[int] = (),
    coordinate: Sequence[int] | None = (),
    placements: Sequence[Any] = (),
    placement: ParamPlacement | None = None,
) -> list[Piece]:
    """The arithmetic behind `pieces`, on plain data, so that a layout of any size can be checked in one process.

    `part_shape`: shape that the DTensor calls global, i.e. what one tp/ep rank holds. `local`: this rank's shard of
    it. `coordinate` is None on a rank outside the mesh, which then holds nothing.
    """
    runs_of = _runs_here(part_shape, mesh_shape, coordinate, placements, placement)
    if runs_of is None:
        return []
    expected = tuple(sum(run.size for run in runs) for runs in runs_of)
    if tuple(local.shape) != expected:
        raise ValueError(f"the local part has shape {tuple(local.shape)}, its placement says {expected}")
    local = local.detach()
    return [
        Piece(box=box, view=_narrow(local, [run.local for run in runs], box.size)) for box, runs in _product(runs_of)
    ]


def boxes_of_ranks(tensor: Tensor, placement: ParamPlacement, degrees: Degrees) -> list[list[Box]]:
    """The boxes of a parameter that each rank of the world holds, in rank order. Arithmetic alone: nothing is exchanged.

    `tensor` and `placement` are this rank's; another rank's differ only in the coordinates. Whoever relies on it compares its own
    boxes with its own line (`owners.MatrixOwners` does).
    """
    mesh_shape, cuts = (tuple(tensor.device_mesh.shape), tensor.placements) if isinstance(tensor, DTensor) else ((), ())
    found = []
    for rank in range(degrees.world):
        dense, (edp_rank, _) = degrees.dense(rank), degrees.sparse(rank)
        coordinate = divmod(edp_rank, degrees.edp_shard) if placement.kind == "expert" else dense[:2]
        runs_of = _runs_here(
            tuple(tensor.shape),
            mesh_shape,
            coordinate[len(coordinate) - len(mesh_shape) :],
            cuts,
            _placement_on(placement, rank, degrees),
        )
        assert runs_of is not None
        found.append([box for box, _ in _product(runs_of)])
    return found


def _placement_on(placement: ParamPlacement, rank: int, degrees: Degrees) -> ParamPlacement:
    """The same parameter's placement on another rank."""
    tp_rank, ep_rank = degrees.dense(rank)[2], degrees.sparse(rank)[1]
    if placement.kind == "expert":
        return replace(placement, index=ep_rank)
    if placement.boxes:
        ((_, local, size),) = placement.boxes
        return replace(placement, boxes=((tp_rank // placement.replicas * size, local, size),))
    return placement if placement.count == 1 else replace(placement, index=tp_rank)


def _runs_here(
    part_shape: Sequence[int],
    mesh_shape: Sequence[int],
    coordinate: Sequence[int] | None,
    placements: Sequence[Any],
    placement: ParamPlacement | None,
) -> list[list[Run]] | None:
    """Runs per dimension of what the rank at `coordinate` holds; None outside the mesh."""
    runs_of = _runs_of_part(tuple(part_shape), placement=placement)
    if coordinate is None:
        return None
    for axis, how in enumerate(placements):
        if isinstance(how, Replicate):
            continue
        dim = getattr(how, "dim", None)
        if dim is None:
            raise ValueError(f"placement {how} is no part of a tensor (reduce partial sums first)")
        # _StridedShard is private to torch; its split_factor is all we read, and its order is tested against torch.
        bounds = _shard_intervals(
            sum(run.size for run in runs_of[dim]),
            index=coordinate[axis],
            count=mesh_shape[axis],
            split_factor=int(getattr(how, "split_factor", 1)),
        )
        runs_of[dim] = _take(runs_of[dim], intervals=bounds)
    return runs_of


def _product(runs_of: list[list[Run]]) -> Iterator[tuple[Box, tuple[Run, ...]]]:
    """The boxes that the runs of all dimensions make."""
    for runs in itertools.product(*runs_of):
        yield Box(tuple(run.start for run in runs), tuple(run.size for run in runs)), runs


def holds_first_copy(tensor: Tensor, placement: ParamPlacement) -> bool:
    """True on exactly one of the ranks that hold the same values (tp replicas, hybrid-sharding replicas)."""
    if not placement.first_replica:
        return False
    if isinstance(tensor, DTensor):
        coordinate = tensor.device_mesh.get_coordinate()
        assert coordinate is not None
        return all(coordinate[axis] == 0 for axis, how in enumerate(tensor.placements) if not isinstance(how, Shard))
    return True


def chunk_bounds(length: int, *, index: int, count: int) -> tuple[int, int]:
    """[start, stop) of piece `index` when `length` is split like `torch.chunk(count)`; empty pieces at the end."""
    size = -(-length // count)
    start = min(index * size, length)
    return start, min(start + size, length)


def _runs_of_part(part_shape: tuple[int, ...], *, placement: ParamPlacement | None) -> list[list[Run]]:
    """Runs per dimension of the part one tp/ep rank holds, before FSDP cuts it."""
    runs_of = [[Run(0, 0, length)] if length else [] for length in part_shape]
    if placement is None:
        return runs_of
    shape, dim = placement.global_shape, placement.dim
    if len(shape) != len(part_shape):
        raise ValueError(f"part of shape {part_shape} does not have the rank of the global shape {shape}")
    if shape and not 0 <= dim < len(shape):
        raise ValueError(f"placement dim {dim} is not a dimension of {shape}")
    if shape:
        runs_of[dim] = placement.runs()
    wanted = tuple(sum(run.size for run in runs_of[d]) if d == dim else shape[d] for d in range(len(shape)))
    if wanted != part_shape:
        raise ValueError(f"part of shape {part_shape}, but its placement in {shape} says {wanted}")
    return runs_of


def _shard_intervals(length: int, *, index: int, count: int, split_factor: int) -> list[tuple[int, int]]:
    """Local intervals a mesh axis keeps. A strided shard keeps its chunk of each of `split_factor` chunks."""
    intervals = []
    for part in range(split_factor):
        base, end = chunk_bounds(length, index=part, count=split_factor)
        start, stop = chunk_bounds(end - base, index=index, count=count)
        intervals.append((base + start, base + stop))
    return intervals


def _take(runs: Iterable[Run], *, intervals: Sequence[tuple[int, int]]) -> list[Run]:
    """Select local [start, stop) intervals of `runs` and renumber the local positions from 0.

    Neighbours are not merged: explicit boxes must be cut at the same places on every rank that repeats them.
    """
    taken = []
    cursor = 0
    runs = list(runs)
    for start, stop in intervals:
        for run in runs:
            low, high = max(start, run.local), min(stop, run.local + run.size)
            if low < high:
                taken.append(Run(run.start + low - run.local, cursor + low - start, high - low))
        cursor += stop - start
    return taken


def _narrow(tensor: Tensor, offset: Sequence[int], size: Sequence[int]) -> Tensor:
    for dim, (start, length) in enumerate(zip(offset, size, strict=True)):
        tensor = tensor.narrow(dim, start, length)
    return tensor

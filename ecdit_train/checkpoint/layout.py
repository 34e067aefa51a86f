"""Where each rank's bytes lie in the global tensor: the layout-free description that a checkpoint stores.

A rank holds *boxes* of an N-D global tensor. Two cuts make them, and both are 1-D facts per dimension:

    global tensor --(tp / ep: ParamPlacement)--> part that a module holds --(FSDP2: DTensor)--> this rank's shard

A dimension is described by *runs*, stretches that are contiguous both in the global tensor and in the local one.
A cut selects intervals of runs; the boxes are the product of the runs of all dimensions. Column (dim 0 twice), row
(dim 1, then dim 0), experts, HSDP replicas, strided shards and repeated kv heads are all this one composition.

FSDP2 follows `torch.chunk`: the pieces are ceil(n / count) long, the last ones shorter or empty.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Replicate

from ecdit_train.errors import CheckpointError
from ecdit_train.parallel.placement import ParamPlacement

DTYPES: Mapping[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    )
}
"""The dtypes a checkpoint may hold, by the name written in the manifest."""


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

    def within(self, view: torch.Tensor, part: Box) -> torch.Tensor:
        """The view of `part` inside `view`, where `view` holds this box. No copy."""
        for dim, (start, base, length) in enumerate(zip(part.offset, self.offset, part.size, strict=True)):
            view = view.narrow(dim, start - base, length)
        return view

    def __str__(self) -> str:
        return "[" + ", ".join(f"{o}:{o + n}" for o, n in zip(self.offset, self.size, strict=True)) + "]"


@dataclass(frozen=True, slots=True)
class Run:
    """`size` positions of one dimension: global `start ...` are local `local ...`."""

    start: int
    local: int
    size: int


def placed_runs(placement: ParamPlacement) -> list[Run]:
    """Runs of the module's part along `placement.dim`. Raises CheckpointError if they cannot be."""
    if not placement.global_shape:
        raise CheckpointError("a 0-d tensor cannot be split")
    length = placement.global_shape[placement.dim]
    if not placement.boxes:
        if not 0 <= placement.index < placement.count:
            raise CheckpointError(f"chunk index {placement.index} is not in 0..{placement.count - 1}")
        start, stop = chunk_bounds(length, index=placement.index, count=placement.count)
        return [Run(start, 0, stop - start)] if stop > start else []
    cursor = 0
    for start, local, size in placement.boxes:
        if local != cursor or size <= 0 or start < 0 or start + size > length:
            raise CheckpointError(
                f"box (global {start}, local {local}, size {size}) must follow local {cursor} and stay in {length}"
            )
        cursor += size
    return [Run(*box) for box in placement.boxes]


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A local tensor or FSDP2 DTensor together with its place in the global tensor."""

    tensor: torch.Tensor
    placement: ParamPlacement


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A box of the global tensor and the view of this rank's memory that holds it (shape == box.size)."""

    box: Box
    view: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class TensorSlice:
    """One tensor as a rank sees it: what it is globally, and which boxes are here (none is fine)."""

    name: str
    global_shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]


Value = torch.Tensor | Placed | TensorSlice
"""What `save` and `load` take by name: whole tensors, FSDP2 DTensors, placed tensors, or ready slices."""


def describe_all(tensors: Mapping[str, Value]) -> list[TensorSlice]:
    """Slices in name order. Raises CheckpointError listing every tensor that cannot be described."""
    slices, problems = [], []
    for name in sorted(tensors):
        try:
            slices.append(describe(name, value=tensors[name]))
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError("\n".join(problems))
    return slices


def describe(name: str, *, value: Value) -> TensorSlice:
    """The slice of one tensor on this rank; views share memory with `value`. Raises CheckpointError.

    An FSDP2 module must be in its sharded state: take parameters from `model.state_dict()`, not from a forward.
    """
    if isinstance(value, TensorSlice):
        _check_slice(value, name=name)
        return value
    placement = value.placement if isinstance(value, Placed) else None
    tensor = value.tensor if isinstance(value, Placed) else value
    if isinstance(tensor, DTensor):
        mesh = tensor.device_mesh
        with torch.no_grad():
            local = tensor.to_local()
        coordinate = mesh.get_coordinate()
        return describe_sharded(
            name,
            local=local,
            part_shape=tuple(tensor.shape),
            mesh_shape=tuple(mesh.shape),
            coordinate=None if coordinate is None else tuple(coordinate),
            placements=tensor.placements,
            placement=placement,
        )
    return describe_sharded(name, local=tensor, part_shape=tuple(tensor.shape), placement=placement)


def describe_sharded(
    name: str,
    *,
    local: torch.Tensor,
    part_shape: Sequence[int],
    mesh_shape: Sequence[int] = (),
    coordinate: Sequence[int] | None = (),
    placements: Sequence[Any] = (),
    placement: ParamPlacement | None = None,
) -> TensorSlice:
    """The arithmetic behind `describe`, on plain data, so that a layout of any size can be checked in one process.

    `part_shape`: shape that the DTensor calls global, i.e. what one tp/ep rank holds. `local`: this rank's shard of
    it. `coordinate` is None on a rank outside the mesh, which then holds nothing.
    """
    if local.layout != torch.strided or local.is_meta:
        raise CheckpointError(
            f"{name}: only dense tensors with storage can be saved or loaded (this is {local.layout})"
        )
    if local.dtype not in DTYPES.values():
        raise CheckpointError(f"{name}: dtype {local.dtype} has no place in a checkpoint; known: {', '.join(DTYPES)}")
    shape = tuple(part_shape) if placement is None else tuple(placement.global_shape)
    try:
        runs_of = _runs_of_part(tuple(part_shape), placement=placement)
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from None
    if coordinate is None:
        return TensorSlice(name=name, global_shape=shape, dtype=local.dtype, pieces=())
    for axis, how in enumerate(placements):
        if isinstance(how, Replicate):
            continue
        dim = getattr(how, "dim", None)
        if dim is None:
            raise CheckpointError(f"{name}: placement {how} cannot be saved (reduce partial sums first)")
        # _StridedShard is private to torch; its split_factor is all we read, and its order is tested against torch.
        bounds = _shard_intervals(
            sum(run.size for run in runs_of[dim]),
            index=coordinate[axis],
            count=mesh_shape[axis],
            split_factor=int(getattr(how, "split_factor", 1)),
        )
        runs_of[dim] = take(runs_of[dim], intervals=bounds)
    expected = tuple(sum(run.size for run in runs) for runs in runs_of)
    if tuple(local.shape) != expected:
        raise CheckpointError(f"{name}: the local part has shape {tuple(local.shape)}, its placement says {expected}")
    local = local.detach()
    pieces = []
    for combination in itertools.product(*runs_of):
        box = Box(tuple(run.start for run in combination), tuple(run.size for run in combination))
        view = local
        for dim, run in enumerate(combination):
            view = view.narrow(dim, run.local, run.size)
        pieces.append(Piece(box=box, view=view))
    return TensorSlice(name=name, global_shape=shape, dtype=local.dtype, pieces=tuple(pieces))


def chunk_bounds(length: int, *, index: int, count: int) -> tuple[int, int]:
    """[start, stop) of piece `index` when `length` is split like `torch.chunk(count)`; empty pieces at the end."""
    size = -(-length // count)
    start = min(index * size, length)
    return start, min(start + size, length)


def take(runs: Iterable[Run], *, intervals: Sequence[tuple[int, int]]) -> list[Run]:
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


def _runs_of_part(part_shape: tuple[int, ...], *, placement: ParamPlacement | None) -> list[list[Run]]:
    """Runs per dimension of the part one tp/ep rank holds, before FSDP cuts it."""
    runs_of = [[Run(0, 0, length)] if length else [] for length in part_shape]
    if placement is None:
        return runs_of
    shape = placement.global_shape
    if len(shape) != len(part_shape):
        raise CheckpointError(f"part of shape {part_shape} does not have the rank of the global shape {shape}")
    dim = placement.dim
    if shape and not 0 <= dim < len(shape):
        raise CheckpointError(f"placement dim {dim} is not a dimension of {shape}")
    if shape:
        runs_of[dim] = placed_runs(placement)
    wanted = tuple(sum(run.size for run in runs_of[d]) if d == dim else shape[d] for d in range(len(shape)))
    if wanted != part_shape:
        raise CheckpointError(f"part of shape {part_shape}, but its placement in {shape} says {wanted}")
    return runs_of


def _shard_intervals(length: int, *, index: int, count: int, split_factor: int) -> list[tuple[int, int]]:
    """Local intervals a mesh axis keeps. A strided shard keeps its chunk of each of `split_factor` chunks."""
    intervals = []
    for part in range(split_factor):
        base, end = chunk_bounds(length, index=part, count=split_factor)
        start, stop = chunk_bounds(end - base, index=index, count=count)
        intervals.append((base + start, base + stop))
    return intervals


def _check_slice(value: TensorSlice, *, name: str) -> None:
    if value.name != name or value.dtype not in DTYPES.values():
        raise CheckpointError(f"{name}: slice is named {value.name!r} with dtype {value.dtype}")
    for piece in value.pieces:
        fits = len(piece.box.offset) == len(piece.box.size) == len(value.global_shape) and all(
            o >= 0 and n > 0 and o + n <= length
            for o, n, length in zip(piece.box.offset, piece.box.size, value.global_shape, strict=True)
        )
        if not fits or tuple(piece.view.shape) != piece.box.size or piece.view.dtype != value.dtype:
            raise CheckpointError(f"{name}: box {piece.box} does not fit {value.global_shape} or its view")

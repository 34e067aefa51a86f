"""Who writes what: all ranks' boxes together, checked to cover every tensor exactly once.

The plan is a pure function of the gathered tables, so every rank computes the same one and fails with the same words,
and after it a rank only has to report checksums: file names, offsets and sizes follow from the plan.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from ecdit_train.checkpoint.failures import together
from ecdit_train.checkpoint.layout import DTYPES, TensorSlice
from ecdit_train.errors import CheckpointError
from ecdit_train.parallel.placement import Box
from ecdit_train.parallel.runtime import Json, Peers, encode_json

ALIGNMENT = 64
"""Every chunk starts at a multiple of this many bytes (cache line; enough for any dtype and for mmap readers)."""

MAX_CHUNK_BYTES = 64 * 2**20
"""One checksum covers at most this much; also the staging memory a save or load needs at a time."""


@dataclass(frozen=True, kw_only=True)
class Holding:
    """One box of one tensor and every rank that holds it; `writer` is the rank that writes it."""

    name: str
    box: Box
    holders: tuple[int, ...]
    writer: int


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """What a tensor is, globally."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize


@dataclass(frozen=True, kw_only=True)
class PlannedChunk:
    """A contiguous stretch of one file: `box` of `name` at byte `offset`."""

    name: str
    box: Box
    offset: int
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class SavePlan:
    """Everything about a save except the bytes: identical on all ranks."""

    tensors: dict[str, TensorInfo]
    holdings: tuple[Holding, ...]
    digest: str

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors, each counted once (padding not included)."""
        return sum(math.prod(info.shape) * info.itemsize for info in self.tensors.values())

    def chunks_of(self, rank: int) -> list[PlannedChunk]:
        """The chunks in `rank`'s file, in file order."""
        return self._lay_out([holding for holding in self.holdings if holding.writer == rank])

    def replicas_of(self, rank: int) -> list[Holding]:
        """Boxes that `rank` holds and another rank writes."""
        return [h for h in self.holdings if h.writer != rank and rank in h.holders]

    def split(self, holding: Holding) -> list[PlannedChunk]:
        """The chunks one box is cut into (offsets relative to its first byte)."""
        return self._lay_out([holding])

    def chunks_by_rank(self) -> dict[int, list[PlannedChunk]]:
        """`chunks_of` for every rank that writes something, in one pass."""
        mine: dict[int, list[Holding]] = defaultdict(list)
        for holding in self.holdings:
            mine[holding.writer].append(holding)
        return {rank: self._lay_out(holdings) for rank, holdings in mine.items()}

    def _lay_out(self, holdings: Sequence[Holding]) -> list[PlannedChunk]:
        chunks, cursor = [], 0
        for holding in holdings:
            itemsize = self.tensors[holding.name].itemsize
            for box in split_box(holding.box, itemsize=itemsize):
                cursor = -(-cursor // ALIGNMENT) * ALIGNMENT
                chunks.append(PlannedChunk(name=holding.name, box=box, offset=cursor, nbytes=box.volume * itemsize))
                cursor += chunks[-1].nbytes
        return chunks


def agree_on_plan(slices: Sequence[TensorSlice], *, comm: Peers, last: SavePlan | None = None) -> SavePlan:
    """The plan of all ranks. `last`, a plan of an earlier save, is reused when no rank's layout has changed.

    Raises CheckpointError on every rank, naming the tensor, when boxes overlap or leave a hole.
    """
    table = to_table(slices)
    mine = hashlib.sha256(encode_json(table)).hexdigest()
    answers = together(comm, lambda: [mine, last.digest if last else ""])
    digest = hashlib.sha256("".join(layout for layout, _ in answers).encode()).hexdigest()
    if last is not None and all(known == digest for _, known in answers):
        return last
    return make_plan(together(comm, lambda: table), digest=digest)


def to_table(slices: Sequence[TensorSlice]) -> Json:
    """What one rank tells the others: {name: [shape, dtype, [[offset, size], ...]]}."""
    return {
        s.name: [
            list(s.global_shape),
            str(s.dtype).removeprefix("torch."),
            [[list(piece.box.offset), list(piece.box.size)] for piece in s.pieces],
        ]
        for s in slices
    }


def make_plan(tables: Sequence[Json], *, digest: str = "") -> SavePlan:
    """Check the tables of all ranks (in rank order) against each other and choose one writer for each box."""
    tensors: dict[str, TensorInfo] = {}
    holders: dict[str, dict[Box, list[int]]] = defaultdict(dict)
    problems = []
    for rank, table in enumerate(tables):
        for name, (shape, dtype, boxes) in table.items():
            info = TensorInfo(shape=tuple(shape), dtype=dtype)
            first = tensors.setdefault(name, info)
            if info != first:
                problems.append(
                    f"{name}: rank {rank} says {info.dtype}{list(info.shape)}, "
                    f"an earlier rank {first.dtype}{list(first.shape)}"
                )
            for offset, size in boxes:
                ranks = holders[name].setdefault(Box(tuple(offset), tuple(size)), [])
                if rank in ranks:
                    problems.append(f"{name}: rank {rank} gives box {Box(tuple(offset), tuple(size))} twice")
                ranks.append(rank)
    problems = problems or _check_tensors(tensors, holders=holders)
    if problems:
        rest = f"\n... and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise CheckpointError("\n".join(problems[:20]) + rest)

    load = [0] * len(tables)
    holdings = []
    for name in sorted(tensors):
        for box, ranks in sorted(holders[name].items()):
            # Replicas share the writing: the holder with the least bytes so far, the lowest rank among equals.
            writer = ranks[0] if len(ranks) == 1 else min(ranks, key=lambda rank: (load[rank], rank))
            load[writer] += box.volume * tensors[name].itemsize
            holdings.append(Holding(name=name, box=box, holders=tuple(ranks), writer=writer))
    return SavePlan(tensors=tensors, holdings=tuple(holdings), digest=digest)


def _check_tensors(tensors: dict[str, TensorInfo], *, holders: dict[str, dict[Box, list[int]]]) -> list[str]:
    seen: dict[tuple[tuple[int, ...], frozenset[Box]], str | None] = {}  # moments and EMA repeat their parameter
    problems = []
    for name in sorted(tensors):
        shape, boxes = tensors[name].shape, frozenset(holders[name])
        key = (shape, boxes)
        if key not in seen:
            seen[key] = cover_problem(shape, boxes=sorted(boxes))
        if (problem := seen[key]) is not None:
            problems.append(f"{name}: {problem}")
    return problems


def cover_problem(shape: tuple[int, ...], *, boxes: Sequence[Box]) -> str | None:
    """Why `boxes` do not cover a tensor of `shape` exactly once, or None. No overlap + right volume = exact cover."""
    for box in boxes:
        if any(o < 0 or n <= 0 or o + n > length for o, n, length in zip(box.offset, box.size, shape, strict=True)):
            return f"box {box} is not inside shape {list(shape)}"
    if (pair := _overlap(boxes, num_dims=len(shape))) is not None:
        return f"boxes {pair[0]} and {pair[1]} of shape {list(shape)} overlap without being equal"
    covered, wanted = sum(box.volume for box in boxes), math.prod(shape)
    if covered != wanted:
        return f"the boxes of all ranks cover {covered} of {wanted} elements of shape {list(shape)}"
    return None


def _overlap(boxes: Sequence[Box], *, num_dims: int) -> tuple[Box, Box] | None:
    """Some pair of boxes that overlap. Sweeps along the dimension with the most distinct starts."""
    if num_dims == 0:
        return (boxes[0], boxes[1]) if len(boxes) > 1 else None
    dim = max(range(num_dims), key=lambda d: len({box.offset[d] for box in boxes}))
    active: list[Box] = []
    for box in sorted(boxes, key=lambda b: b.offset[dim]):
        active = [other for other in active if other.offset[dim] + other.size[dim] > box.offset[dim]]
        for other in active:
            if box.meet(other) is not None:
                return other, box
        active.append(box)
    return None


def split_box(box: Box, *, itemsize: int) -> list[Box]:
    """Cut a box into boxes of at most MAX_CHUNK_BYTES, along its first dimension that is longer than 1."""
    if box.volume * itemsize <= MAX_CHUNK_BYTES:
        return [box]
    dim = next(d for d, length in enumerate(box.size) if length > 1)
    row_bytes = box.volume // box.size[dim] * itemsize
    step = max(1, MAX_CHUNK_BYTES // row_bytes)
    parts = []
    for start in range(0, box.size[dim], step):
        length = min(step, box.size[dim] - start)
        part = Box(
            (*box.offset[:dim], box.offset[dim] + start, *box.offset[dim + 1 :]),
            (*box.size[:dim], length, *box.size[dim + 1 :]),
        )
        parts.append(split_box(part, itemsize=itemsize))
    return list(itertools.chain.from_iterable(parts))

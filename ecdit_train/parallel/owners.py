"""Whole matrices out of shards and back, for optimizers that cannot work on a shard (Muon).

Every matrix has one owner among all ranks. A round takes some matrices of every owner: one all-to-all brings their pieces to the
owners, the owners compute, a second all-to-all takes the results to all ranks that hold a piece. Nothing here knows FSDP, tensor
or expert parallelism: `placement.boxes_of_ranks` says which boxes of a parameter each rank holds, and the rest is boxes.

- Of ranks that hold the same box one sends it; all of them get the result, so copies stay the same bits.
- The owner is a rank that holds a piece; of these, the one with the least work so far. A matrix that one rank alone holds whole (an
  expert, as a rule; everything in one process) does not travel.
- The plan of the exchange is a pure function of the layout, computed alike on all ranks.
- A round is as large as `round_bytes` allows: what an owner takes in or, for copies, sends out.

Why owners and not a gather: docs/decisions/0013.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .collectives import all_to_all_rows
from .degrees import Degrees
from .mesh import Mesh
from .placement import Box, ParamPlacement, boxes_of_ranks, pieces

Shape = tuple[int, ...]

Parts = tuple[tuple[Box, tuple[int, ...]], ...]
"""Boxes that together are a matrix, each with the ranks that hold it."""


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """Where the parameters of a model lie among the ranks: what an optimizer is told (`OptimizerConfig.build`)."""

    mesh: Mesh
    placements: Mapping[str, ParamPlacement]

    @classmethod
    def whole(cls, tensors: Mapping[str, Tensor]) -> Sharding:
        """All of them in this one process."""
        placements = {name: ParamPlacement(global_shape=tuple(t.shape)) for name, t in tensors.items()}
        one = Degrees(world=1, dp_replicate=1, dp_shard=1, tp=1, ep=1)
        return cls(mesh=Mesh(degrees=one, rank=0, device_type="cpu"), placements=placements)


def matrices_of(shape: Shape) -> Iterator[Box]:
    """The matrices of a parameter: itself with two dims, one for each position on dim 0 with three (stacked experts)."""
    rows, cols = shape[-2:]
    if len(shape) == 2:
        yield Box((0, 0), shape)
    else:
        for k in range(shape[0]):
            yield Box((k, 0, 0), (1, rows, cols))


def assign(work: Sequence[float], *, holders: Sequence[tuple[int, ...] | range], world: int) -> list[int]:
    """An owner for each matrix: of the ranks that hold a part of it (a tuple or range), the one with the least work so
    far (the lowest of equals).

    Matrices with few holders choose first, then the largest. Deterministic. Where all ranks hold a part of every
    matrix, no rank's work exceeds the mean by more than one matrix.
    """
    load, owner = [0.0] * world, [0] * len(work)
    heaps: dict[tuple[int, ...] | range, list[tuple[float, int]]] = {}
    for n in sorted(range(len(work)), key=lambda n: (len(holders[n]), -work[n], n)):
        if (heap := heaps.get(holders[n])) is None:
            heap = heaps[holders[n]] = [(load[rank], rank) for rank in holders[n]]
            heapq.heapify(heap)
        while heap[0][0] != load[heap[0][1]]:  # loads only grow, so an old entry comes up too early, never too late
            heapq.heapreplace(heap, (load[heap[0][1]], heap[0][1]))
        rank = heap[0][1]
        owner[n] = rank
        load[rank] += work[n]
    return owner


@dataclass(frozen=True, kw_only=True, eq=False)
class Matrix:
    """One matrix of parameter `name`: `box` of the global tensor."""

    name: str
    box: Box
    parts: Parts
    owner: int
    senders: tuple[int, ...]
    """Of each part's holders, the one that sends it to the owner."""


@dataclass(frozen=True, kw_only=True)
class Leg:
    """One all-to-all as this rank sees it: stretches of one flat buffer, in the order of the rank at the other end."""

    leaving: tuple[tuple[Matrix, Box], ...]
    coming: tuple[tuple[Matrix, Box], ...]
    sent: list[int]
    """Elements to each rank."""
    received: list[int]


@dataclass(frozen=True, kw_only=True)
class Round:
    """Pieces to owners, and results back."""

    out: Leg
    back: Leg
    owned: tuple[Matrix, ...]


class MatrixOwners:
    """The exchange of a set of parameters, planned once. All ranks make it, and call `run`, together.

    Args:
        params: parameters of two or three dims by name, the same names in the same order on all ranks.
        work: (rows, cols) -> what a matrix costs its owner.
        dtype: of what travels.
        round_bytes: bound on an owner's buffer; one matrix at least travels in a round.
    """

    def __init__(
        self,
        params: Mapping[str, Tensor],
        sharding: Sharding,
        *,
        work: Callable[[int, int], float],
        dtype: torch.dtype,
        round_bytes: int,
    ) -> None:
        self._mesh, self._itemsize, self._round_bytes = sharding.mesh, dtype.itemsize, round_bytes
        self._nothing = torch.empty(0, dtype=dtype, device=next((p.device for p in params.values()), None))
        found = list(self._describe(params, sharding))
        holders = [ranks for _, _, _, ranks in found]
        owner = assign([work(*box.size[-2:]) for _, box, _, _ in found], holders=holders, world=self._mesh.world)
        load = [0] * self._mesh.world
        self.matrices = tuple(
            Matrix(name=name, box=box, parts=parts, owner=owner[n], senders=_senders(parts, owner[n], load))
            for n, (name, box, parts, _) in enumerate(found)
        )
        rank = self._mesh.rank
        self.alone = tuple(m for m, ranks in zip(self.matrices, holders, strict=True) if ranks == (rank,))
        travelling = [m for m, ranks in zip(self.matrices, holders, strict=True) if len(ranks) > 1]
        self.rounds = tuple(self._round(some) for some in self._cut(travelling))

    @property
    def sent_bytes(self) -> int:
        """What this rank puts into the buffers of a `run`, its own stretch included."""
        return self._itemsize * sum(sum(r.out.sent) + sum(r.back.sent) for r in self.rounds)

    def run(
        self,
        *,
        take: Callable[[str, Box], Tensor],
        compute: Callable[[Tensor], Tensor],
        give: Callable[[str, Box, Tensor], None],
    ) -> None:
        """`compute` every matrix whole. Collective.

        `take(name, box)` is asked for values of a box that this rank holds, in the type that travels; `compute` gets
        (k, rows, cols), or (rows, cols) for a parameter of two dims, and returns the same shape; `give(name, box,
        values)` gets the results of every box that this rank holds.
        """
        for batch in self._batches(self.alone):
            result = compute(_stack([take(m.name, m.box) for m in batch]))
            for m, value in zip(batch, _unstack(result, batch), strict=True):
                give(m.name, m.box, value)
        for r in self.rounds:
            came = self._exchange(r.out, [take(m.name, box) for m, box in r.out.leaving])
            whole = {m: self._nothing.new_empty(m.box.size) for m in r.owned}
            for (m, box), values in came:
                m.box.within(whole[m], box).copy_(values)
            for batch in self._batches(r.owned):
                result = compute(_stack([whole.pop(m) for m in batch]))
                whole |= zip(batch, _unstack(result, batch), strict=True)
            results = [m.box.within(whole[m], box) for m, box in r.back.leaving]
            for (m, box), values in self._exchange(r.back, results):
                give(m.name, box, values)

    def _exchange(self, leg: Leg, values: Sequence[Tensor]) -> list[tuple[tuple[Matrix, Box], Tensor]]:
        leaving = [v.flatten() for v in values]
        flat = torch.cat(leaving) if leaving else self._nothing
        group = self._mesh.world_group
        assert group is not None
        flat = all_to_all_rows(flat, leg.sent, leg.received, group)
        came = flat.split([box.volume for _, box in leg.coming])
        return [((m, box), v.view(box.size)) for (m, box), v in zip(leg.coming, came, strict=True)]

    def _batches(self, matrices: Sequence[Matrix]) -> Iterator[list[Matrix]]:
        """Matrices of one parameter, as many as `round_bytes` holds."""
        for _, some in itertools.groupby(matrices, key=lambda m: m.name):
            group = list(some)
            size = max(1, self._round_bytes // (group[0].box.volume * self._itemsize))
            for first in range(0, len(group), size):
                yield group[first : first + size]

    def _describe(
        self, params: Mapping[str, Tensor], sharding: Sharding
    ) -> Iterator[tuple[str, Box, Parts, tuple[int, ...]]]:
        """Every matrix with its parts, their holders, and all of these together; parameters that lie alike are described once."""
        known: dict[object, list[list[Box]]] = {}
        cut: dict[object, list[tuple[Parts, tuple[int, ...]]]] = {}
        degrees, rank = self._mesh.degrees, self._mesh.rank
        for name, p in params.items():
            placement = sharding.placements[name]
            key = (placement, tuple(p.shape), getattr(p, "placements", None))
            if key not in known:
                known[key] = boxes_of_ranks(p, placement, degrees)
                cut[key] = [_parts(box, known[key]) for box in matrices_of(placement.global_shape)]
            mine = [piece.box for piece in pieces(p, placement)]
            assert mine == known[key][rank], f"{name}: this rank holds {mine}, the layout says {known[key][rank]}"
            for box, (parts, holders) in zip(matrices_of(placement.global_shape), cut[key], strict=True):
                yield name, box, parts, holders

    def _cut(self, matrices: Sequence[Matrix]) -> Iterator[list[Matrix]]:
        """Rounds: of every owner's matrices, in order, as many as fit."""
        queue: dict[int, list[Matrix]] = {}
        for m in matrices:
            queue.setdefault(m.owner, []).append(m)
        place = dict.fromkeys(queue, 0)
        while any(place[owner] < len(waiting) for owner, waiting in queue.items()):
            some: list[Matrix] = []
            for owner, waiting in queue.items():
                filled = 0
                while place[owner] < len(waiting):
                    m = waiting[place[owner]]
                    nbytes = self._itemsize * sum(box.volume * len(holders) for box, holders in m.parts)
                    if filled and filled + nbytes > self._round_bytes:
                        break
                    some.append(m)
                    filled, place[owner] = filled + nbytes, place[owner] + 1
            yield some

    def _round(self, some: Sequence[Matrix]) -> Round:
        rank = self._mesh.rank
        out, back = [], []
        for m in some:
            for sender, (box, holders) in zip(m.senders, m.parts, strict=True):
                out.append((sender, m.owner, m, box))
                back += [(m.owner, holder, m, box) for holder in holders]
        owned = tuple(m for m in some if m.owner == rank)
        return Round(out=self._leg(out), back=self._leg(back), owned=owned)

    def _leg(self, moves: Sequence[tuple[int, int, Matrix, Box]]) -> Leg:
        """`moves`: (from, to, matrix, box) of all ranks, in one order that all ranks know."""
        rank, world = self._mesh.rank, self._mesh.world
        leaving = sorted(((to, m, box) for source, to, m, box in moves if source == rank), key=lambda x: x[0])
        coming = sorted(((source, m, box) for source, to, m, box in moves if to == rank), key=lambda x: x[0])
        sent, received = [0] * world, [0] * world
        for to, _, box in leaving:
            sent[to] += box.volume
        for source, _, box in coming:
            received[source] += box.volume
        return Leg(
            leaving=tuple((m, box) for _, m, box in leaving),
            coming=tuple((m, box) for _, m, box in coming),
            sent=sent,
            received=received,
        )


def _parts(matrix: Box, boxes_of: Sequence[Sequence[Box]]) -> tuple[Parts, tuple[int, ...]]:
    """The boxes inside a matrix, each with its holders; and all of these."""
    holders: dict[Box, list[int]] = {}
    for rank, boxes in enumerate(boxes_of):
        for box in boxes:
            if (part := matrix.meet(box)) is not None:
                holders.setdefault(part, []).append(rank)
    assert sum(part.volume for part in holders) == matrix.volume, f"{matrix}: parts overlap or leave a hole"
    every = tuple(sorted({rank for ranks in holders.values() for rank in ranks}))
    return tuple((part, tuple(holders[part])) for part in sorted(holders)), every


def _senders(parts: Parts, owner: int, load: list[int]) -> tuple[int, ...]:
    """The owner where it holds a part itself, else the holder that has sent least; counts into `load`."""
    chosen = []
    for box, holders in parts:
        rank = owner if owner in holders else min(holders, key=lambda r: (load[r], r))
        load[rank] += box.volume
        chosen.append(rank)
    return tuple(chosen)


def _stack(values: Sequence[Tensor]) -> Tensor:
    """Of a parameter with three dims (k, rows, cols); the matrix itself with two."""
    return values[0] if len(values) == 1 else torch.cat(list(values))


def _unstack(result: Tensor, batch: Sequence[Matrix]) -> list[Tensor]:
    return [result] if len(batch) == 1 else list(result.split(1))

"""N ranks as N threads with an in-memory exchange, and the layouts that a run may have, on plain tensors."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import Replicate, Shard

from ecdit_train.checkpoint import TensorSlice
from ecdit_train.parallel.placement import ParamPlacement, chunk_bounds, pieces_of


class ThreadComm:
    """One rank's end of a shared exchange; a broken barrier stands for a lost peer."""

    def __init__(self, rank: int, world: int, board: list[str], meet: threading.Barrier) -> None:
        self.rank, self.world, self._board, self._meet = rank, world, board, meet

    def all_gather_json(self, value: Any) -> list[Any]:
        self._board[self.rank] = json.dumps(value)
        self._meet.wait(20)
        values = [json.loads(text) for text in self._board]
        self._meet.wait(20)
        return values


def run_world(world: int, work: Callable[[ThreadComm], Any]) -> list[Any]:
    """`work(comm)` on every rank; returns each rank's result or the exception it ended with."""
    meet, board = threading.Barrier(world), [""] * world
    results: list[Any] = [None] * world

    def one(rank: int) -> None:
        try:
            results[rank] = work(ThreadComm(rank, world, board, meet))
        except BaseException as error:
            results[rank] = error
            if not isinstance(error, Exception):
                meet.abort()

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def ok(results: list[Any]) -> list[Any]:
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


@dataclass(frozen=True)
class Mesh:
    """Dense axes (dp_replicate, dp_shard, tp) and sparse axes (edp, ep) over the same ranks."""

    dp_replicate: int
    dp_shard: int
    tp: int
    ep: int

    @property
    def world(self) -> int:
        return self.dp_replicate * self.dp_shard * self.tp

    def __str__(self) -> str:
        return f"{self.dp_replicate}x{self.dp_shard}x{self.tp}-ep{self.ep}"


MESHES = [
    Mesh(1, 1, 1, 1),
    Mesh(1, 2, 1, 2),
    Mesh(2, 1, 1, 1),  # pure replication
    Mesh(1, 3, 1, 1),  # uneven shards
    Mesh(1, 2, 2, 2),
    Mesh(1, 1, 4, 4),  # tp > kv heads
    Mesh(1, 6, 1, 2),  # edp 3 over 4 local experts: 2, 2, 0
    Mesh(2, 2, 2, 2),  # HSDP + tp + folded ep
    Mesh(1, 8, 1, 4),
    Mesh(1, 2, 4, 8),
]

HEADS, KV_HEADS, HEAD_DIM, WIDTH = 8, 2, 2, 10


def reference() -> dict[str, torch.Tensor]:
    """The global tensors (every element distinct where the dtype can hold it)."""
    gen = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=gen).to(dtype)

    return {
        "col.bias": draw(24),
        "col.weight": draw(24, WIDTH),
        "empty": draw(0, 4),
        "experts.b1": draw(8, 3, dtype=torch.bfloat16),
        "experts.w1": draw(8, 6, 5),
        "kv.weight": draw(KV_HEADS * HEAD_DIM, WIDTH),
        "mask": draw(5) > 0,
        "norm.weight": draw(13, dtype=torch.bfloat16),
        "qkv.weight": draw((HEADS + 2 * KV_HEADS) * HEAD_DIM, WIDTH),
        "row.weight": draw(7, 24),
        "step": torch.tensor(2**40 + 1),
    }


def placement_of(name: str, shape: tuple[int, ...], *, mesh: Mesh, rank: int) -> ParamPlacement | None:
    tp, ep = rank % mesh.tp, rank % mesh.ep
    if name.startswith("col"):
        return ParamPlacement(global_shape=shape, dim=0, index=tp, count=mesh.tp)
    if name.startswith("row"):
        return ParamPlacement(global_shape=shape, dim=1, index=tp, count=mesh.tp)
    if name.startswith("experts"):
        return ParamPlacement(global_shape=shape, dim=0, index=ep, count=mesh.ep)
    q, kv = HEADS // mesh.tp * HEAD_DIM, max(1, KV_HEADS // mesh.tp) * HEAD_DIM
    kv_start = tp * KV_HEADS // mesh.tp * HEAD_DIM
    if name.startswith("kv"):
        return ParamPlacement(global_shape=shape, boxes=((kv_start, 0, kv),))
    if name.startswith("qkv"):
        base = HEADS * HEAD_DIM
        return ParamPlacement(
            global_shape=shape,
            boxes=((tp * q, 0, q), (base + kv_start, q, kv), (base + KV_HEADS * HEAD_DIM + kv_start, q + kv, kv)),
        )
    return None


def sliced(name: str, local: torch.Tensor, *, placement: ParamPlacement | None = None, **layout: Any) -> TensorSlice:
    """What a rank of a mesh that need not exist says of its shard (`layout`: as for `pieces_of`)."""
    layout.setdefault("part_shape", tuple(local.shape))
    shape = tuple(layout["part_shape"]) if placement is None else placement.global_shape
    pieces = tuple(pieces_of(local, placement=placement, **layout))
    return TensorSlice(name=name, global_shape=shape, dtype=local.dtype, pieces=pieces)


def shard(name: str, full: torch.Tensor, *, mesh: Mesh, rank: int, placed: bool = True) -> TensorSlice:
    """What `rank` would hold: the tp/ep part of `full`, cut by FSDP2 along dim 0. `placed=False` forgets the part."""
    if name == "step":
        return sliced(name, full.clone())
    placement = placement_of(name, tuple(full.shape), mesh=mesh, rank=rank)
    part = full
    if placement is not None:
        part = torch.cat([full.narrow(placement.dim, run.start, run.size) for run in placement.runs()], placement.dim)
    if name.startswith("experts"):
        mesh_shape: tuple[int, ...] = (mesh.world // mesh.ep,)
        coordinate: tuple[int, ...] = (rank // mesh.ep,)
        placements: tuple[Any, ...] = (Shard(0),)
    else:
        mesh_shape = (mesh.dp_replicate, mesh.dp_shard)
        coordinate = (rank // mesh.tp // mesh.dp_shard, rank // mesh.tp % mesh.dp_shard)
        placements = (Replicate(), Shard(0))
    start, stop = chunk_bounds(part.shape[0], index=coordinate[-1], count=mesh_shape[-1])
    return sliced(
        name,
        part[start:stop].clone(),
        part_shape=tuple(part.shape),
        mesh_shape=mesh_shape,
        coordinate=coordinate,
        placements=placements,
        placement=placement if placed else None,
    )


def shards(tensors: dict[str, torch.Tensor], *, mesh: Mesh, rank: int, placed: bool = True) -> dict[str, TensorSlice]:
    return {name: shard(name, full, mesh=mesh, rank=rank, placed=placed) for name, full in tensors.items()}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit equality, shape and dtype included."""
    return a.shape == b.shape and a.dtype == b.dtype and bool((a == b).all())

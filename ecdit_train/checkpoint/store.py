"""Write a checkpoint: temporary folder, chunks with checksums, manifest, one rename.

    all ranks   describe -> agree on who writes what
    rank 0      refuse or make  step_N.tmp-<id>/
    all ranks   write rank_R.bin, fsync; report checksums
    rank 0      compare replicas, write manifest.json, fsync, rename to step_N, fsync     <- the commit

Each arrow is one `together`: a failure on any rank (disk full, a bad shape) is raised on all, and the temporary
folder goes. A crash leaves it; nothing looks at it and `folder.clean` deletes it. A committed folder is never opened
for writing. Raw little-endian bytes and JSON only: there is nothing to unpickle.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import sys
import uuid
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from ecdit_train.checkpoint import files, folder, manifest
from ecdit_train.checkpoint.failures import CheckpointExistsError, together
from ecdit_train.checkpoint.layout import TensorSlice, Value, describe_all
from ecdit_train.checkpoint.plan import Holding, PlannedChunk, SavePlan, TensorInfo, agree_on_plan, make_plan
from ecdit_train.errors import CheckpointError
from ecdit_train.parallel.placement import Box
from ecdit_train.parallel.runtime import Json, Peers, alone, encode_json

Replicas = Literal["refuse", "report", "trust"]
"""What to do about ranks that hold the same box: compare checksums and refuse to commit when they differ (also the
only way to see a tp shard that was passed without its placement), compare and report, or do not read replicas."""


@dataclass(frozen=True, kw_only=True)
class SaveReport:
    """A committed checkpoint. `plan` may be handed to the next save, which then skips the exchange of layouts."""

    path: Path
    step: int
    nbytes: int
    drifted: tuple[str, ...]
    plan: SavePlan


def save(
    root: Path | str,
    *,
    step: int,
    tensors: Mapping[str, Value],
    objects: Mapping[str, Json],
    comm: Peers | None = None,
    replicas: Replicas = "refuse",
    plan: SavePlan | None = None,
) -> SaveReport:
    """Commit `tensors` and `objects` as `step` under `root`, or raise the same CheckpointError on every rank.

    Called by all ranks of `comm`. `objects` is JSON and must be equal on all ranks; tuples come back as lists. Tensors
    must not change while this runs. Raises CheckpointExistsError if the step is committed already.
    """
    comm = comm or alone()
    slices: list[TensorSlice] = []

    def describe() -> Json:
        if sys.byteorder != "little":
            raise CheckpointError("checkpoints are little-endian; this machine is not")
        if replicas not in ("refuse", "report", "trust"):
            raise CheckpointError(f"replicas = {replicas!r}: must be refuse, report or trust")
        slices.extend(describe_all(tensors))
        return [str(step), _object_digests(objects)]

    said = together(comm, describe)
    together(comm, lambda: _same_everywhere(said))
    agreed = agree_on_plan(slices, comm=comm, last=plan)
    final = folder.path_of(Path(root), step=step)
    temporary = Path(together(comm, lambda: _begin(final, nbytes=agreed.total_bytes) if comm.rank == 0 else None)[0])
    try:
        sums = together(comm, lambda: _write(temporary, slices=slices, plan=agreed, rank=comm.rank, replicas=replicas))
        drifted = together(
            comm,
            lambda: (
                _commit(temporary, final=final, step=step, plan=agreed, sums=sums, objects=objects, replicas=replicas)
                if comm.rank == 0
                else None
            ),
        )[0]
    except CheckpointError:
        if comm.rank == 0:  # every rank has stopped writing: they all came to the exchange that raised this
            files.remove_tree(temporary)
        raise
    nbytes = sum(chunk["nbytes"] for chunk in sums)
    return SaveReport(path=final, step=step, nbytes=nbytes, drifted=tuple(drifted), plan=agreed)


def save_stream(
    root: Path | str,
    *,
    step: int,
    tensors: Mapping[str, TensorInfo],
    read: Callable[[str, Box], torch.Tensor],
    objects: Mapping[str, Json],
) -> SaveReport:
    """`save` by one process that never holds a whole tensor: `read` gives each box when its turn comes."""
    _object_digests(objects)
    boxes = {n: [[[0] * len(i.shape), list(i.shape)]] if math.prod(i.shape) else [] for n, i in tensors.items()}
    plan = make_plan([{n: [list(i.shape), i.dtype, boxes[n]] for n, i in tensors.items()}])
    final = folder.path_of(Path(root), step=step)
    temporary = Path(_begin(final, nbytes=plan.total_bytes))
    try:
        nbytes, written = _write_file(
            temporary, chunks=plan.chunks_of(0), rank=0, read=lambda c: as_bytes(read(c.name, c.box))
        )
        sums = [{"nbytes": nbytes, "written": written, "held": []}]
        _commit(temporary, final=final, step=step, plan=plan, sums=sums, objects=objects, replicas="trust")
    except BaseException:
        files.remove_tree(temporary)
        raise
    return SaveReport(path=final, step=step, nbytes=nbytes, drifted=(), plan=plan)


def _begin(final: Path, *, nbytes: int) -> str:
    """Rank 0: make the temporary folder, or say why this save cannot be."""
    if os.path.lexists(final):
        raise CheckpointExistsError(
            f"{final} is committed already and is never written into; set it aside to save this step again"
        )
    if not final.parent.is_dir():
        final.parent.mkdir(parents=True, exist_ok=True)
        files.sync_folder(final.parent.parent)
    free = shutil.disk_usage(final.parent).free
    if free < nbytes:
        raise CheckpointError(f"{final.parent}: {free} bytes free, this checkpoint needs {nbytes}")
    temporary = final.with_name(f"{final.name}.tmp-{uuid.uuid4().hex}")
    temporary.mkdir()
    return str(temporary)


def _write(temporary: Path, *, slices: list[TensorSlice], plan: SavePlan, rank: int, replicas: Replicas) -> Json:
    """This rank's file. Returns checksums in plan order: of the chunks written, and of the replicas held."""
    views = {(s.name, piece.box): piece.view for s in slices for piece in s.pieces}
    boxes_of: dict[str, list[Box]] = {}
    for name, box in views:
        boxes_of.setdefault(name, []).append(box)

    def data_of(chunk: PlannedChunk) -> memoryview:
        box = next(box for box in boxes_of[chunk.name] if box.meet(chunk.box) is not None)
        return as_bytes(box.within(views[chunk.name, box], chunk.box))

    cursor, written = _write_file(temporary, chunks=plan.chunks_of(rank), rank=rank, read=data_of)
    held: list[list[int]] = []
    if replicas != "trust":
        for holding in plan.replicas_of(rank):
            held.append([zlib.crc32(data_of(chunk)) for chunk in plan.split(holding)])
    return {"nbytes": cursor, "written": written, "held": held}


def _write_file(
    temporary: Path, *, chunks: list[PlannedChunk], rank: int, read: Callable[[PlannedChunk], memoryview]
) -> tuple[int, list[int]]:
    """One rank's file: its size and the checksums of its chunks. No file without chunks."""
    written: list[int] = []
    cursor = 0
    if chunks:
        with files.new_file(temporary / manifest.data_file(rank)) as descriptor:
            for chunk in chunks:
                data = read(chunk)
                if chunk.offset > cursor:
                    files.write_all(descriptor, data=bytes(chunk.offset - cursor))
                files.write_all(descriptor, data=data)
                written.append(zlib.crc32(data))
                cursor = chunk.offset + chunk.nbytes
    return cursor, written


def _commit(
    temporary: Path,
    *,
    final: Path,
    step: int,
    plan: SavePlan,
    sums: list[Json],
    objects: Mapping[str, Json],
    replicas: Replicas,
) -> list[str]:
    """Rank 0: everything from checksums to the rename. Returns the tensors whose replicas differ."""
    drifted = {} if replicas == "trust" else _compare_replicas(plan, sums=sums)
    if drifted and replicas == "refuse":
        raise CheckpointError("\n".join(drifted.values()))
    sizes = {manifest.data_file(rank): said["nbytes"] for rank, said in enumerate(sums) if said["nbytes"]}
    for name, nbytes in sizes.items():
        try:
            seen = os.lstat(temporary / name).st_size
        except FileNotFoundError:
            raise CheckpointError(
                f"{name} is not visible to rank 0: {final.parent} must be shared by all ranks"
            ) from None
        if seen != nbytes:
            raise CheckpointError(f"{name} has {seen} bytes on rank 0, its writer wrote {nbytes}")
    entries: dict[str, list[manifest.Chunk]] = {name: [] for name in plan.tensors}
    for rank, chunks in plan.chunks_by_rank().items():
        for chunk, crc in zip(chunks, sums[rank]["written"], strict=True):
            entries[chunk.name].append(
                manifest.Chunk(manifest.data_file(rank), chunk.offset, chunk.nbytes, crc, chunk.box)
            )
    described = manifest.Manifest(
        step=step,
        id=temporary.name.rpartition("-")[2],
        world=len(sums),
        torch_version=str(torch.__version__),
        files=sizes,
        tensors={
            name: manifest.Entry(info=plan.tensors[name], chunks=tuple(chunks)) for name, chunks in entries.items()
        },
        objects=objects,
    )
    with files.new_file(temporary / manifest.NAME) as descriptor:
        files.write_all(descriptor, data=manifest.to_bytes(described))
    files.sync_folder(temporary)
    try:
        files.rename_new(temporary, target=final)
    except FileExistsError:
        raise CheckpointExistsError(f"{final} was committed by another run while this save was in flight") from None
    folder.hint_latest(final.parent, step=step)
    return list(drifted)


def _compare_replicas(plan: SavePlan, *, sums: list[Json]) -> dict[str, str]:
    """{tensor: what differs} for boxes whose holders disagree (the first such box of each tensor)."""
    truth: dict[tuple[str, Box], int] = {}
    for rank, chunks in plan.chunks_by_rank().items():
        for chunk, crc in zip(chunks, sums[rank]["written"], strict=True):
            truth[chunk.name, chunk.box] = crc
    drifted: dict[str, str] = {}
    replicas: dict[int, list[Holding]] = {rank: [] for rank in range(len(sums))}
    for holding in plan.holdings:
        for rank in holding.holders:
            if rank != holding.writer:
                replicas[rank].append(holding)
    for rank, holdings in replicas.items():
        for holding, crcs in zip(holdings, sums[rank]["held"], strict=True):
            if holding.name in drifted:
                continue
            if [truth[chunk.name, chunk.box] for chunk in plan.split(holding)] != crcs:
                drifted[holding.name] = (
                    f"{holding.name}: ranks {holding.writer} and {rank} both hold {holding.box} but with different "
                    "bytes; either a tp/ep shard lacks its ParamPlacement or replicas have drifted apart"
                )
    return drifted


def as_bytes(view: torch.Tensor) -> memoryview:
    """Row-major bytes of a tensor on any device; no copy where it is contiguous on the CPU."""
    flat = view.detach().to("cpu").contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def _object_digests(objects: Mapping[str, Json]) -> dict[str, str]:
    """One digest per object. Raises CheckpointError naming what JSON would lose."""
    digests = {}
    for name, value in objects.items():
        _check_keys(value, where=name)
        try:
            digests[name] = hashlib.sha256(encode_json(value)).hexdigest()
        except (TypeError, ValueError, RecursionError) as error:
            raise CheckpointError(f"object {name!r} is not JSON: {error}") from error
    return digests


def _check_keys(value: Json, *, where: str) -> None:
    """JSON would silently turn a key 1 into "1"."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise CheckpointError(f"object {where}: key {key!r} is not a string")
            _check_keys(inner, where=f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            _check_keys(inner, where=f"{where}[{i}]")


def _same_everywhere(said: list[Json]) -> None:
    """Step and objects must be the same on all ranks: only rank 0's are written."""
    for rank, (step, digests) in enumerate(said):
        if step != said[0][0]:
            raise CheckpointError(f"rank {rank} saves step {step}, rank 0 step {said[0][0]}")
        names = [n for n in sorted({*digests, *said[0][1]}) if digests.get(n) != said[0][1].get(n)]
        if names:
            raise CheckpointError(f"rank {rank} has other objects than rank 0: {', '.join(names[:20])}")

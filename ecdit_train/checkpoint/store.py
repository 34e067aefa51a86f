"""Write a checkpoint: temporary folder, chunks with checksums, manifest, one rename.

    begin    all ranks   describe -> agree on who writes what
             rank 0      refuse or make  step_N.tmp-<id>/
    write    each rank   write rank_R.safetensors and rank_R.sums, fsync; report
    commit   rank 0      compare replicas, write manifest.json, fsync, rename to step_N, fsync     <- the commit

`begin` and `commit` are collective; `write` is not, so it may be done elsewhere while training goes on. A failure on
any rank (disk full, a bad shape) is raised on all, and the temporary folder goes. A crash leaves it; nothing looks at
it and `folder.clean` deletes it. A committed folder is never opened for writing. Raw little-endian bytes and JSON only:
there is nothing to unpickle.
"""

from __future__ import annotations

import os
import shutil
import sys
import uuid
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from ecdit_train.checkpoint import copies, files, folder, manifest, rank_file
from ecdit_train.checkpoint import plan as planning
from ecdit_train.checkpoint import sums as sums_module
from ecdit_train.checkpoint.failures import CheckpointExistsError, CheckpointStorageError, together
from ecdit_train.checkpoint.folder import Home
from ecdit_train.checkpoint.layout import Memo, TensorSlice, Value
from ecdit_train.checkpoint.objects import object_digests, same_everywhere
from ecdit_train.checkpoint.plan import PlannedChunk, SavePlan, agree_on_plan
from ecdit_train.checkpoint.rank_file import TensorInfo
from ecdit_train.checkpoint.sums import BlockSums
from ecdit_train.errors import CheckpointError, EcditError
from ecdit_train.parallel.placement import Box
from ecdit_train.parallel.runtime import Json, Peers, alone

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


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one rank does in a save, as plain values: it can be sent to a process that has nothing but bytes."""

    folder: str
    """The temporary folder."""
    id: str
    rank: int
    header: bytes
    """Of this rank's file."""
    chunks: tuple[PlannedChunk, ...]
    """In the order of the file, which holds the first `num_written`; the rest are copies that are only compared."""
    num_written: int

    @property
    def nbytes(self) -> int:
        """Of all chunks together, which is what `write` reads."""
        return sum(chunk.nbytes for chunk in self.chunks)


@dataclass(frozen=True, kw_only=True)
class Save:
    """A save that all ranks have agreed on and nobody has written: this rank's side of it."""

    final: Path
    temporary: Path
    home: Home | None
    """On rank 0."""
    step: int
    objects: Mapping[str, Json]
    lineage: Json
    comm: Peers
    replicas: Replicas
    plan: SavePlan
    slices: tuple[TensorSlice, ...]
    part: Part

    def views(self) -> list[torch.Tensor]:
        """Of the live tensors: one for each of `part.chunks`."""
        boxes_of = {s.name: s.pieces for s in self.slices}
        found = []
        for chunk in self.part.chunks:
            piece = next(piece for piece in boxes_of[chunk.name] if piece.box.meet(chunk.box) is not None)
            found.append(piece.view if piece.box == chunk.box else piece.box.within(piece.view, chunk.box))
        return found


def save(
    root: Path | str | Callable[[], Home | Path],
    *,
    step: int,
    tensors: Mapping[str, Value],
    objects: Mapping[str, Json],
    lineage: Json = None,
    comm: Peers | None = None,
    replicas: Replicas = "refuse",
    plan: SavePlan | None = None,
) -> SaveReport:
    """Commit `tensors` and `objects` as `step` under `root`, or raise the same CheckpointError on every rank.

    Called by all ranks of `comm`. `objects` is JSON and must be equal on all ranks; tuples come back as lists.
    `lineage` is JSON too: where this comes from, as rank 0 says. Tensors must not change while this runs. A `root` that
    is a Home is never made anew. Raises CheckpointExistsError if the step is committed already, CheckpointMovedError if
    the home is gone.
    """
    begun = begin(
        root, step=step, tensors=tensors, objects=objects, lineage=lineage, comm=comm, replicas=replicas, plan=plan
    )
    return commit(begun, written=lambda: write_live(begun))


def begin(
    root: Path | str | Callable[[], Home | Path],
    *,
    step: int,
    tensors: Mapping[str, Value],
    objects: Mapping[str, Json],
    lineage: Json = None,
    comm: Peers | None = None,
    replicas: Replicas = "refuse",
    plan: SavePlan | None = None,
    memo: Memo | None = None,
) -> Save:
    """The first of three steps, by all ranks: agree on who writes what and make the temporary folder. Errors as `save`.
    `plan` and `memo`: of the save before, so that what is as it was is not worked out again."""
    comm = comm or alone()
    slices: list[TensorSlice] = []

    def describe() -> Json:
        if sys.byteorder != "little":
            raise CheckpointError("checkpoints are little-endian; this machine is not")
        if replicas not in ("refuse", "report", "trust"):
            raise CheckpointError(f"replicas = {replicas!r}: must be refuse, report or trust")
        slices.extend((memo or Memo()).describe_all(tensors))
        object_digests({"lineage": lineage})
        return [str(step), object_digests(objects)]

    said = together(comm, describe)
    together(comm, lambda: same_everywhere(said))
    agreed = agree_on_plan(slices, comm=comm, last=plan)
    homes: list[Home] = []

    def make() -> Json:
        if comm.rank != 0:
            return None
        where = root() if callable(root) else Path(root)
        homes.append(where if isinstance(where, Home) else Home.make(where))
        return _begin(homes[0], step=step, nbytes=agreed.total_bytes)

    temporary = Path(together(comm, make)[0])
    return Save(
        final=temporary.with_name(folder.name_of(step)),
        temporary=temporary,
        home=homes[0] if homes else None,
        step=step,
        objects=objects,
        lineage=lineage,
        comm=comm,
        replicas=replicas,
        plan=agreed,
        slices=tuple(slices),
        part=_part(temporary, plan=agreed, rank=comm.rank, compare=replicas != "trust"),
    )


def _part(temporary: Path, *, plan: SavePlan, rank: int, compare: bool) -> Part:
    chunks = plan.chunks_of(rank)
    num_written = sum(chunk.offset >= 0 for chunk in chunks)
    id = temporary.name.rpartition("-")[2]
    return Part(
        folder=str(temporary),
        id=id,
        rank=rank,
        header=plan.files.header(rank, save=id),
        chunks=chunks if compare else chunks[:num_written],
        num_written=num_written,
    )


def write(part: Part, *, read: Callable[[int], memoryview]) -> Json:
    """The second step, by each rank alone: no exchange, no torch.distributed, so another process may do it.

    `read(n)` gives the bytes of `part.chunks[n]`, and is asked once for each, in order. Returns this rank's report
    for `commit`. Raises OSError.
    """
    shared: list[int] = []

    def take(n: int) -> memoryview:
        data = read(n)
        shared.append(zlib.crc32(data) if part.chunks[n].group >= 0 else 0)
        return data

    nbytes, sha256 = 0, ""
    if part.num_written:
        file, sums = rank_file.file_name(part.rank), BlockSums()
        with files.new_file(Path(part.folder) / file) as descriptor:
            for n in range(-1, part.num_written):
                data = memoryview(part.header) if n < 0 else take(n)
                files.write_all(descriptor, data=data)
                sums.add(data)
        pages = sums.pages(save=part.id, file=file)
        with files.new_file(Path(part.folder) / rank_file.sums_name(part.rank)) as descriptor:
            files.write_all(descriptor, data=pages)
        nbytes, sha256 = sums.nbytes, sums_module.digest(pages)
    for n in range(part.num_written, len(part.chunks)):
        take(n)
    return {
        "header": len(part.header),
        "nbytes": nbytes,
        "sums": sha256,
        "copies": copies.by_group(part.chunks, shared),
    }


def write_live(begun: Save) -> Json:
    """`write` from the tensors themselves, which must not change meanwhile."""
    views = begun.views()
    return write(begun.part, read=lambda n: as_bytes(views[n]))


def commit(begun: Save, *, written: Callable[[], Json], still_ours: Callable[[], None] = lambda: None) -> SaveReport:
    """The last step, by all ranks: compare copies, write the manifest, rename.

    `written` gives what `write` returned, or raises what it raised: every rank then raises, and the temporary folder goes.
    `still_ours` is asked on rank 0 before the rename, and raises when another job has taken the folder.
    """
    comm, reports = begun.comm, []

    def tell() -> Json:
        reports.append(written())
        return {**reports[0], "copies": copies.digests(reports[0]["copies"]) if begun.replicas != "trust" else {}}

    try:
        told = together(comm, tell)
        groups = copies.differing([said["copies"] for said in told])
        drifted: dict[str, str] = {}
        if groups:
            sums = together(comm, lambda: {g: reports[0]["copies"][g] for g in groups if g in reports[0]["copies"]})
            drifted = copies.drifted(begun.plan, sums, groups)
        if drifted and begun.replicas == "refuse":
            raise CheckpointError("\n".join(drifted.values()))
        together(comm, lambda: _commit(begun, told=told, still_ours=still_ours) if comm.rank == 0 else None)
    except EcditError:
        abandon(begun)  # every rank has stopped writing: they all came to the exchange that raised this
        raise
    nbytes = sum(said["nbytes"] for said in told)
    return SaveReport(path=begun.final, step=begun.step, nbytes=nbytes, drifted=tuple(drifted), plan=begun.plan)


def begin_again(begun: Save) -> Save:
    """The same save in a new temporary folder, by all ranks, when what was written so far cannot be used."""
    comm = begun.comm

    def renew() -> Json:
        if begun.home is None:
            return None
        abandon(begun)
        return _begin(begun.home, step=begun.step, nbytes=begun.plan.total_bytes)

    temporary = Path(together(comm, renew)[0])
    part = _part(temporary, plan=begun.plan, rank=comm.rank, compare=begun.replicas != "trust")
    return replace(begun, temporary=temporary, part=part)


def abandon(begun: Save) -> None:
    """Remove the temporary folder (rank 0 does). Only when no rank writes any more."""
    if begun.comm.rank == 0:
        files.remove_tree(begun.temporary)


def save_stream(
    root: Path | str,
    *,
    step: int,
    tensors: Mapping[str, TensorInfo],
    read: Callable[[str, Box], torch.Tensor],
    objects: Mapping[str, Json],
    lineage: Json = None,
) -> SaveReport:
    """`save` by one process that never holds a whole tensor: `read` gives each box when its turn comes."""
    object_digests({**objects, "lineage": lineage})
    plan, begun = planning.whole(tensors), None
    try:
        home = Home.make(Path(root))
        temporary = Path(_begin(home, step=step, nbytes=plan.total_bytes))
        part = _part(temporary, plan=plan, rank=0, compare=False)
        begun = Save(
            final=temporary.with_name(folder.name_of(step)), temporary=temporary, home=home, step=step, objects=objects,
            lineage=lineage, comm=alone(), replicas="trust", plan=plan, slices=(), part=part,
        )  # fmt: skip
        said = write(part, read=lambda n: as_bytes(read(part.chunks[n].name, part.chunks[n].box)))
        return commit(begun, written=lambda: said)
    except BaseException as error:
        if begun is not None:
            abandon(begun)
        if isinstance(error, OSError):
            raise CheckpointError(f"{root}: {type(error).__name__}: {error}") from error
        raise


def _begin(home: Home, *, step: int, nbytes: int) -> str:
    """Rank 0: make the temporary folder, or say why this save cannot be."""
    home.check()
    final = folder.path_of(home.path, step=step)
    if os.path.lexists(final):
        raise CheckpointExistsError(
            f"{final} is committed already and is never written into; set it aside to save this step again"
        )
    free = shutil.disk_usage(home.path).free
    if free < nbytes:
        raise CheckpointStorageError(f"{home.path}: {free} bytes free, this checkpoint needs {nbytes}")
    temporary = final.with_name(f"{final.name}.tmp-{uuid.uuid4().hex}")
    temporary.mkdir()
    return str(temporary)


def _commit(begun: Save, *, told: list[Json], still_ours: Callable[[], None]) -> None:
    """Rank 0: everything from the reports to the rename."""
    assert begun.home is not None
    ranks = {
        rank: manifest.RankFile(header=said["header"], nbytes=said["nbytes"], sums_sha256=said["sums"])
        for rank, said in enumerate(told)
        if said["nbytes"]
    }
    for rank, file in ranks.items():
        for name, nbytes in (
            (rank_file.file_name(rank), file.nbytes),
            (rank_file.sums_name(rank), sums_module.sums_bytes(file.nbytes)),
        ):
            try:
                seen = os.lstat(begun.temporary / name).st_size
            except FileNotFoundError:
                begun.home.check()
                raise CheckpointError(
                    f"{name} is not visible to rank 0: {begun.final.parent} must be shared by all ranks"
                ) from None
            if seen != nbytes:
                raise CheckpointError(f"{name} has {seen} bytes on rank 0, its writer wrote {nbytes}")
    data = manifest.to_bytes(
        step=begun.step,
        id=begun.part.id,
        world=begun.plan.world,
        torch_version=str(torch.__version__),
        lineage=begun.lineage,
        objects=begun.objects,
        entries=begun.plan.entries,
        patterns=begun.plan.patterns,
        ranks=ranks,
    )
    with files.new_file(begun.temporary / manifest.NAME) as descriptor:
        files.write_all(descriptor, data=data)
    files.sync_folder(begun.temporary)
    begun.home.check()
    still_ours()
    try:
        files.rename_new(begun.temporary, target=begun.final)
    except FileExistsError:
        raise CheckpointExistsError(
            f"{begun.final} was committed by another run while this save was in flight"
        ) from None
    folder.hint_latest(begun.final.parent, step=begun.step)


def as_bytes(view: torch.Tensor) -> memoryview:
    """Row-major bytes of a tensor on any device; no copy where it is contiguous on the CPU."""
    flat = view.detach().to("cpu").contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]

"""Read a checkpoint: check everything, then copy in place; or check everything and say what is broken.

`load` reads only the chunks that this rank's boxes touch, whatever layout wrote them. It runs twice over them: the
first pass only checks checksums, and no rank starts the second (the copy) before all have finished the first, so a
damaged checkpoint or a model it does not fit leaves every target as it was.
"""

from __future__ import annotations

import os
import stat
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ecdit_train.checkpoint import files, manifest
from ecdit_train.checkpoint.failures import CheckpointDamagedError, CheckpointMismatchError, together
from ecdit_train.checkpoint.layout import DTYPES, TensorSlice, Value, describe_all
from ecdit_train.checkpoint.manifest import Chunk, Manifest
from ecdit_train.errors import CheckpointError
from ecdit_train.parallel.placement import Box, Piece
from ecdit_train.parallel.runtime import Json, Peers, alone


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What came from where; the tensors are in the targets."""

    path: Path
    step: int
    objects: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class _Copy:
    """The common part of a stored chunk and a target's box."""

    part: Box
    piece: Piece


def load(
    path: Path | str,
    *,
    targets: Mapping[str, Value],
    comm: Peers | None = None,
    skip: Sequence[str] = (),
) -> Loaded:
    """Copy the checkpoint at `path` into `targets` in place. All ranks of `comm` call it; rank 0's `path` is taken.

    Strict: names, global shapes and dtypes must be equal. `skip`: prefixes of tensor names that may stay unread
    (say `("optimizer.",)` to sample). Raises CheckpointMismatchError listing every difference, CheckpointDamagedError
    naming file and tensor; both before the first target is touched, both on every rank.
    """
    comm = comm or alone()
    where = Path(together(comm, lambda: str(path))[0])
    slices: list[TensorSlice] = []
    read: list[Manifest] = []

    def open_and_describe() -> Json:
        slices.extend(describe_all(targets))
        read.append(manifest.read(where))
        return read[0].sha256

    seen = together(comm, open_and_describe)
    if any(sha != seen[0] for sha in seen):
        raise CheckpointDamagedError(f"{where}: ranks see different manifests (a stale file system cache?)")
    described = read[0]

    answers = together(comm, lambda: _differences(slices, described=described, skip=skip))
    problems = sorted({problem for answer in answers for problem in answer["problems"]})
    missing = set(answers[0]["missing"]).intersection(*(answer["missing"] for answer in answers))
    if missing:
        problems.append(f"only in the checkpoint: {_listed(missing)} (pass skip=<prefix> to leave them unread)")
    if problems:
        raise CheckpointMismatchError(f"{where.name} does not fit:\n" + "\n".join(problems))

    jobs = _jobs(slices, described=described)
    together(comm, lambda: _check(where, jobs=jobs, described=described))
    together(comm, lambda: _copy(where, jobs=jobs, described=described))
    return Loaded(path=where, step=described.step, objects=dict(described.objects))


def verify(path: Path | str) -> Manifest:
    """Read every byte. Raises CheckpointDamagedError listing all damage: file and tensor; extra and missing files."""
    path = Path(path)
    described = manifest.read(path)
    problems = []
    present = set()
    with os.scandir(path) as entries:
        for item in entries:
            present.add(item.name)
            if not stat.S_ISREG(item.stat(follow_symlinks=False).st_mode):
                problems.append(f"{path.name}/{item.name} is not a regular file")
    for extra in sorted(present - set(described.files) - {manifest.NAME}):
        problems.append(f"{path.name}/{extra} is not in the manifest")
    chunks: dict[str, list[tuple[str, Chunk]]] = {name: [] for name in described.files}
    for name, entry in described.tensors.items():
        for chunk in entry.chunks:
            chunks[chunk.file].append((name, chunk))
    padding = manifest.gaps(described)
    for file, nbytes in sorted(described.files.items()):
        try:
            with files.sound_file(path / file, nbytes=nbytes, holds=_tensors_in(chunks[file])) as descriptor:
                for name, chunk in chunks[file]:
                    try:
                        _read_chunk(descriptor, chunk=chunk, name=name, folder=path.name)
                    except CheckpointDamagedError as error:
                        problems.append(str(error))
                for start, stop in padding[file]:
                    if any(files.read_at(descriptor, offset=start, nbytes=stop - start)):
                        problems.append(f"{path.name}/{file}: padding at bytes {start}..{stop} is not zero")
        except CheckpointDamagedError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointDamagedError("\n".join(problems))
    return described


def read_objects(path: Path | str) -> dict[str, Any]:
    """The JSON objects of a checkpoint (manifest checked, data files not read)."""
    return dict(manifest.read(Path(path)).objects)


def load_full(path: Path | str, *, name: str) -> torch.Tensor:
    """One whole tensor on the CPU, for tools. Raises CheckpointMismatchError with near names if there is none."""
    path = Path(path)
    described = manifest.read(path)
    if name not in described.tensors:
        raise CheckpointMismatchError(f"{path.name} has no tensor {name!r}; it has {_listed(set(described.tensors))}")
    shape = described.tensors[name].info.shape
    return read_box(path, name=name, box=Box((0,) * len(shape), shape), described=described)


def read_box(path: Path, *, name: str, box: Box, described: Manifest) -> torch.Tensor:
    """A box of a tensor on the CPU, out of all chunks that meet it. Raises CheckpointDamagedError."""
    info = described.tensors[name].info
    values = torch.empty(box.size, dtype=DTYPES[info.dtype])
    piece = TensorSlice(
        name=name,
        global_shape=info.shape,
        dtype=values.dtype,
        pieces=(Piece(box=box, view=values),) if values.numel() else (),
    )
    for chunk, copies, data in _each(path, jobs=_jobs([piece], described=described), described=described):
        for copy in copies:
            _paste(copy, chunk=chunk, data=data)
    return values


def _differences(slices: Sequence[TensorSlice], *, described: Manifest, skip: Sequence[str]) -> Json:
    """What does not fit on this rank. A name is missing only if no rank has it, so that is left to the caller."""
    have = {s.name for s in slices}
    extra = have - set(described.tensors)
    problems = [f"only in the targets: {_listed(extra)}"] if extra else []
    for target in slices:
        if target.name in extra:
            continue
        info = described.tensors[target.name].info
        dtype = str(target.dtype).removeprefix("torch.")
        if info.shape != target.global_shape:
            problems.append(
                f"{target.name}: shape {list(info.shape)} in the checkpoint, {list(target.global_shape)} in the target"
            )
        if info.dtype != dtype:
            problems.append(f"{target.name}: dtype {info.dtype} in the checkpoint, {dtype} in the target")
    missing = [name for name in described.tensors if name not in have and not name.startswith(tuple(skip))]
    return {"problems": problems, "missing": missing}


_Jobs = dict[str, list[tuple[str, Chunk, list[_Copy]]]]


def _jobs(slices: Sequence[TensorSlice], *, described: Manifest) -> _Jobs:
    """{file: [(tensor, chunk, copies)]}, in file order: each needed chunk is read once per pass."""
    jobs: _Jobs = defaultdict(list)
    for target in slices:
        for chunk in described.tensors[target.name].chunks if target.pieces else ():
            copies = [
                _Copy(part=part, piece=piece)
                for piece in target.pieces
                if (part := chunk.box.meet(piece.box)) is not None
            ]
            if copies:
                jobs[chunk.file].append((target.name, chunk, copies))
    for work in jobs.values():
        work.sort(key=lambda item: item[1].offset)
    return jobs


def _each(where: Path, *, jobs: _Jobs, described: Manifest) -> Iterator[tuple[Chunk, list[_Copy], bytearray]]:
    for file, work in sorted(jobs.items()):
        holds = _tensors_in((name, chunk) for name, chunk, _ in work)
        with files.sound_file(where / file, nbytes=described.files[file], holds=holds) as descriptor:
            for name, chunk, copies in work:
                yield chunk, copies, _read_chunk(descriptor, chunk=chunk, name=name, folder=where.name)


def _check(where: Path, *, jobs: _Jobs, described: Manifest) -> None:
    for _ in _each(where, jobs=jobs, described=described):
        pass


def _copy(where: Path, *, jobs: _Jobs, described: Manifest) -> None:
    try:
        with torch.no_grad():
            for chunk, copies, data in _each(where, jobs=jobs, described=described):
                for copy in copies:
                    _paste(copy, chunk=chunk, data=data)
    except CheckpointDamagedError as error:
        # Not CheckpointDamagedError: nobody may go on with an older step after targets have been touched.
        raise CheckpointError(f"{error}; it changed while being loaded, the targets are now unusable") from error


def _paste(copy: _Copy, *, chunk: Chunk, data: bytearray) -> None:
    target = copy.piece.box.within(copy.piece.view, copy.part)
    source = torch.frombuffer(data, dtype=target.dtype).reshape(chunk.box.size)
    target.copy_(chunk.box.within(source, copy.part))


def _read_chunk(descriptor: int, *, chunk: Chunk, name: str, folder: str) -> bytearray:
    where = f"{folder}/{chunk.file} at byte {chunk.offset}: tensor {name} {chunk.box}"
    try:
        data = files.read_at(descriptor, offset=chunk.offset, nbytes=chunk.nbytes)
    except CheckpointDamagedError as error:
        raise CheckpointDamagedError(f"{where}: {error}") from error
    if (found := zlib.crc32(data)) != chunk.crc32:
        raise CheckpointDamagedError(f"{where}: CRC32 {found:08x}, the manifest says {chunk.crc32:08x}")
    return data


def _tensors_in(chunks: Iterable[tuple[str, Chunk]]) -> str:
    return "tensors " + _listed({name for name, _ in chunks})


def _listed(names: set[str]) -> str:
    """Up to 20 names in order."""
    ordered = sorted(names)
    return ", ".join(ordered[:20]) + (f", ... ({len(ordered)} in all)" if len(ordered) > 20 else "")

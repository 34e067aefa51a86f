"""Writing shards so that a second run changes nothing and a kill at any moment loses one shard at most.

The unit of work is one output shard: `x.tar.part-*` -> rename to `x.tar` -> `x.idx` -> `x.done.json`. A shard whose
done record names the same parameters and whose files have the recorded sizes is skipped; anything else is written
again from the start. The manifest comes last. Bytes are deterministic: ustar, members in one order (payload first),
no times, no owners. The standard library's `tarfile` writes them: webdataset's writer sorts members by suffix, which
puts json before the pixels, and importing it imports torch. `webdataset` reads the result like any other (tested).
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from data_pipeline.commit import commit, temporary_sibling, write_committed
from data_pipeline.errors import BadMember, BadSplit, WrongView
from data_pipeline.index import Index, index_bytes, index_path, refuse_damage, scan, write_index
from data_pipeline.manifest import MANIFEST, Shard, View, describe, read_manifest, write_manifest
from data_pipeline.parts import Part
from data_pipeline.tar import split_name

ImageFormat = Literal["png", "jpg", "npy"]
JPEG_QUALITY = 95
_TEXT_SUFFIXES = ("txt", "json")


@dataclass(frozen=True, kw_only=True)
class RawMembers:
    """One sample to write: a key and the bytes of its members by suffix ("png", "txt", "latent.npy")."""

    key: str
    members: Mapping[str, bytes]


class Samples(Protocol):
    """What `write_shards` needs; a list will do. A lazy one makes its samples when their shard is written."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> RawMembers: ...


def write_shards(
    samples: Samples, folder: Path | str, *, samples_per_shard: int = 1000, name: str = "shard",
    params: Mapping[str, Any] | None = None, workers: int = 1, part: Part | None = None,
) -> View | None:  # fmt: skip
    """Write a sequence of samples as indexed shards `name-000000.tar`, ... and a manifest.

    Of a part only its shards; it writes the manifest if it finds the others' finished, else it returns None.

    Args:
        samples: a list, or anything lazy with `len` and `[i]`.
        params: JSON-able description of everything that decides the bytes. With it, a repeated call skips finished
            shards without making their samples. Without it, every shard is written again (to equal bytes).
        workers: processes, one shard at a time each; samples must then be picklable.
        part: which shards; needs `params`, by which it knows those of other parts. None: all.

    Raises:
        WrongView: the folder holds a data set made with other parameters.
        BadSplit: no samples, or samples_per_shard below 1.
        BadMember: a key or a suffix that no reader would take.
    """
    folder = Path(folder)
    if not len(samples) or samples_per_shard < 1:
        raise BadSplit(f"{len(samples)} samples in shards of {samples_per_shard}: both must be 1 or more")
    meta = {**(params or {}), "name": name, "count": len(samples), "samples_per_shard": samples_per_shard}
    digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest() if params is not None else ""
    _refuse_other(folder, meta=meta)
    folder.mkdir(parents=True, exist_ok=True)
    firsts = range(0, len(samples), samples_per_shard)
    tasks = [
        _ShardTask(
            tar=folder / f"{name}-{number:06d}.tar", first=first,
            stop=min(first + samples_per_shard, len(samples)), params_sha256=digest,
        )
        for number, first in enumerate(firsts)
    ]  # fmt: skip
    mine = tasks if part is None else part.mine(tasks)
    if workers > 1:
        # spawn, not fork: the caller may hold threads (torch, a loader) that do not survive a fork
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            shards = list(pool.map(partial(_write_shard, samples), mine))
    else:
        shards = [_write_shard(samples, task) for task in mine]
    if part is not None:
        every = [_finished(task) for task in tasks]
        shards = [shard for shard in every if shard is not None]
        if len(shards) < len(tasks):
            return None
    return write_manifest(folder, shards=shards, meta=meta)


def encode_image(image: np.ndarray, *, image_format: ImageFormat) -> bytes:
    """uint8 (H, W, 3) RGB to file bytes; png and npy are exact."""
    if image_format == "npy":
        stream = io.BytesIO()
        np.lib.format.write_array(stream, np.ascontiguousarray(image), allow_pickle=False)
        return stream.getvalue()
    if image_format == "jpg":
        import simplejpeg

        return simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=JPEG_QUALITY, colorspace="RGB")
    import cv2

    done, png = cv2.imencode(".png", image[:, :, ::-1])
    assert done
    return png.tobytes()


@dataclass(frozen=True, kw_only=True)
class _ShardTask:
    tar: Path
    first: int
    stop: int
    params_sha256: str

    @property
    def done(self) -> Path:
        return self.tar.with_suffix(".done.json")


def _write_shard(samples: Samples, task: _ShardTask) -> Shard:
    """Make one shard, or find it finished."""
    finished = _finished(task)
    if finished is not None:
        return finished
    task.done.unlink(missing_ok=True)  # from here until the end the shard counts as unmade
    part = temporary_sibling(task.tar)
    try:
        with tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in range(task.first, task.stop):
                _add_sample(tar, samples[number], shard=task.tar.name)
        index = _index(part, shard=task.tar.name)
        commit(part, task.tar)
    finally:
        part.unlink(missing_ok=True)
    write_index(index, index_path(task.tar))
    shard = describe(task.tar, index=index)
    record = {"params_sha256": task.params_sha256, "first": task.first, "stop": task.stop, "shard": asdict(shard)}
    write_committed((json.dumps(record, sort_keys=True) + "\n").encode(), task.done)
    return shard


def _index(part: Path, *, shard: str) -> Index:
    """Raises BadMember where a sample that was written would not be read."""
    scanned = scan(part, promises=False)
    refuse_damage(part, scanned.found)
    if scanned.found.rejected:
        why = ", ".join(f"{count} {why}" for why, count in scanned.found.rejected.items())
        raise BadMember(f"shard {shard}: {why}; keys must differ, and the members of a sample stand side by side")
    return scanned.index


def _add_sample(tar: tarfile.TarFile, sample: RawMembers, *, shard: str) -> None:
    # Payload first: a reader that wants pixels only can stop early. Then by name, whatever order the caller had.
    for suffix in sorted(sample.members, key=lambda s: (s in _TEXT_SUFFIXES, s)):
        name = f"{sample.key}.{suffix}"
        try:
            if split_name(name) != (sample.key, suffix):
                raise BadMember("the key may not contain a dot")
        except BadMember as error:
            raise BadMember(f"shard {shard}: key {sample.key!r}, suffix {suffix!r}: {error}") from None
        info = tarfile.TarInfo(name)  # uid, gid, mtime are 0 and the owner is empty
        info.size, info.mode = len(sample.members[suffix]), 0o444
        try:
            tar.addfile(info, io.BytesIO(sample.members[suffix]))
        except ValueError as error:
            raise BadMember(f"shard {shard}: key {sample.key!r}: {error}") from error


def _finished(task: _ShardTask) -> Shard | None:
    """The recorded row of a shard that is complete and was made with the same parameters."""
    if not task.params_sha256:
        return None
    try:
        record = json.loads(task.done.read_bytes())
        shard = Shard(**{**record["shard"], "fields": tuple(record["shard"]["fields"])})
        same = (record["params_sha256"], record["first"], record["stop"]) == (
            task.params_sha256, task.first, task.stop,
        )  # fmt: skip
        whole = task.tar.stat().st_size == shard.bytes
        indexed = index_path(task.tar).stat().st_size in index_bytes(shard.n, fields=shard.fields)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return shard if same and whole and indexed else None


def _refuse_other(folder: Path, *, meta: Mapping[str, Any]) -> None:
    """A finished data set is never overwritten by another one."""
    if not (folder / MANIFEST).exists():
        return
    there = read_manifest(folder).meta
    wanted = json.loads(json.dumps(meta))
    different = [f"{k}: there {there.get(k)!r}, asked {wanted.get(k)!r}" for k in sorted({*there, *wanted})
                 if there.get(k) != wanted.get(k)]  # fmt: skip
    if different:
        raise WrongView(f"{folder} holds another data set ({'; '.join(different)}); choose another folder or remove it")

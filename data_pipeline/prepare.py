"""Any sequence of samples as shards: what tests and generators of data call. Whole sources are `preparing.pack`'s."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from data_pipeline.errors import BadSplit, WrongView
from data_pipeline.manifest import MANIFEST, View, read_manifest
from data_pipeline.parts import Part
from data_pipeline.preparing import drive
from data_pipeline.preparing.local import Local
from data_pipeline.preparing.pixels import JPEG_QUALITY, ImageFormat, encode_image
from data_pipeline.preparing.tarring import RawMembers, write_tar
from data_pipeline.preparing.work import Count, Service, Task

__all__ = ["JPEG_QUALITY", "ImageFormat", "RawMembers", "Samples", "encode_image", "write_shards"]


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
    _refuse_other(folder, meta=meta)
    work = _Sequence(
        samples=samples,
        folder=folder,
        name=name,
        per_shard=samples_per_shard,
        params=meta if params is not None else {},
    )
    done = drive.run(work, folder, runner=Local(workers=workers), part=part, plan=False, steal=False)
    return drive.seal(done, folder, meta=meta)


@dataclass(frozen=True, kw_only=True)
class _Sequence:
    """`work.Work`."""

    samples: Samples
    folder: Path
    name: str
    per_shard: int
    params: Mapping[str, Any]
    service: None = None

    def tasks(self) -> list[Task]:
        return [
            Task(number=number, output=self.folder / f"{self.name}-{number:06d}.tar", inputs=(), piece=first)
            for number, first in enumerate(range(0, len(self.samples), self.per_shard))
        ]

    def make(self, task: Task, *, out: Path, service: Service | None) -> Count:
        count = Count()

        def made() -> Iterator[RawMembers]:
            for number in range(task.piece, min(task.piece + self.per_shard, len(self.samples))):
                count.keep()
                yield self.samples[number]

        write_tar(made(), out, shard=task.output.name)
        return count


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

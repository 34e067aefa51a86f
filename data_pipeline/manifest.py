"""`manifest.json`: which shards make a data set. Its sha256 names the data set and goes into the loader state.

Checks come in two prices. `open_view` looks at existence and sizes only, at every start of a run. `verify` reads
every byte, once after a copy.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.commit import write_committed
from data_pipeline.errors import CorruptShard, DataError, MissingShard, TruncatedShard
from data_pipeline.index import Index, index_bytes, index_path, load_index, parse_index
from data_pipeline.parts import Part
from data_pipeline.store.contract import Store
from data_pipeline.store.copies import close, copied_manifest, downloaded
from data_pipeline.store.place import is_remote, join, open_store
from data_pipeline.tally import read_tally

MANIFEST = "manifest.json"
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One row: file name, samples, bytes and sha256 of the tar, field names in the index's order."""

    name: str
    n: int
    bytes: int
    sha256: str
    fields: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class View:
    """A data set as training sees it. `sha256` is that of the manifest; `meta` is free information of its writer."""

    folder: Path
    shards: tuple[Shard, ...]
    sha256: str
    meta: Mapping[str, Any] = field(default_factory=dict)
    base: str = ""
    """URL below which the tars lie, and the indexes that are not in `folder`; none: all in `folder`."""

    @cached_property
    def store(self) -> Store:
        """Of the tars."""
        return open_store(self.base or self.folder)

    @property
    def place(self) -> str:
        """Of the tars, for messages."""
        return self.base or str(self.folder)

    @property
    def num_samples(self) -> int:
        return sum(shard.n for shard in self.shards)

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """Every field name that occurs in a shard."""
        return tuple(dict.fromkeys(name for shard in self.shards for name in shard.fields))

    @cached_property
    def shard_sizes(self) -> np.ndarray:
        """int64 (S,) samples per shard"""
        return np.array([shard.n for shard in self.shards], dtype=np.int64)

    @cached_property
    def shard_bytes(self) -> np.ndarray:
        """int64 (S,) bytes per tar"""
        return np.array([shard.bytes for shard in self.shards], dtype=np.int64)

    def tar(self, shard: int) -> Path:
        return self.folder / self.shards[shard].name

    def load_index(self, shard: int, *, store: Store | None = None) -> Index:
        """Index of one shard, from the folder, or where it is not there from `store` (that of the tars).

        Raises CorruptShard when it was made for other bytes than the manifest names."""
        row, path = self.shards[shard], index_path(self.tar(shard))
        if self.base and not path.exists():
            name = index_path(Path(row.name)).as_posix()
            index = parse_index((store or self.store).read(name), path=join(self.base, name))
        else:
            index = load_index(path)
        if (index.tar_sha256, len(index), index.tar_bytes) != (row.sha256, row.n, row.bytes):
            raise CorruptShard(f"index of {row.name} in {self.folder}: made for another tar than the manifest names")
        return index


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What a full pass has read."""

    shards: int
    samples: int
    bytes: int
    view_sha256: str


def write_manifest(
    folder: Path, *, shards: Sequence[Shard], meta: Mapping[str, Any] | None = None, base: str = ""
) -> View:
    """Write the manifest, last of all files: a folder without one is an unfinished data set. `base`: see `View`."""
    content = {"version": VERSION, "meta": dict(meta or {}), "shards": [asdict(shard) for shard in shards]}
    content |= {"base": base} if base else {}
    write_committed(_dumped(content), folder / MANIFEST)
    return read_manifest(folder)


def _dumped(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


def read_manifest(folder: Path | str) -> View:
    """Parse the manifest without looking at the shards.

    Raises:
        MissingShard: no manifest in this folder.
        CorruptShard: not a manifest of this version.
    """
    base = ""
    if is_remote(folder):
        base, folder = str(folder).rstrip("/"), copied_manifest(str(folder))
    folder = Path(folder)
    try:
        raw = (folder / MANIFEST).read_bytes()
    except OSError as error:
        raise MissingShard(
            f"no {MANIFEST} in {folder}: {error.strerror}; `ecdit data index` makes one for a folder of WebDataset tars"
        ) from error
    try:
        content = json.loads(raw)
        if content["version"] != VERSION:
            raise CorruptShard(f"{folder / MANIFEST}: version {content['version']}, this program reads {VERSION}")
        shards = tuple(Shard(**{**row, "fields": tuple(row["fields"])}) for row in content["shards"])
        meta, named = dict(content.get("meta", {})), str(content.pop("base", ""))
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptShard(f"{folder / MANIFEST}: not a manifest ({error!r})") from error
    for shard in shards:
        if Path(shard.name).is_absolute() or ".." in Path(shard.name).parts or not shard.name:
            raise CorruptShard(f"{folder / MANIFEST}: shard name {shard.name!r} leads outside of the folder")
    # Where the tars lie is no part of the name: the same set in a folder and in a bucket is one.
    sha256 = hashlib.sha256(_dumped(content) if named else raw).hexdigest()
    return View(folder=folder, shards=shards, sha256=sha256, meta=meta, base=base or named)


def open_view(folder: Path | str) -> View:
    """The data set in a folder, after a check that every shard and index is there with the size it must have.

    Raises:
        MissingShard: naming all absent files and the folder.
        TruncatedShard: a tar or an index is smaller than it must be.
        CorruptShard: it is larger, or the manifest is unreadable.
    """
    view = read_manifest(folder)
    problems: list[DataError] = check_sizes(view) if view.base else []
    for shard in () if view.base else view.shards:
        tar = view.folder / shard.name
        sizes = index_bytes(shard.n, fields=shard.fields)
        for path, expected in ((tar, (shard.bytes,)), (index_path(tar), sizes)):
            try:
                size = path.stat().st_size
            except OSError:
                problems.append(MissingShard(f"{path.name} is missing in {view.folder}"))
                continue
            if size not in expected:
                kind = TruncatedShard if size < expected[0] else CorruptShard
                problems.append(kind(f"{path.name} in {view.folder} has {size} bytes, must have {expected[0]}"))
    raise_all(problems)
    return view


def check_sizes(view: View) -> list[DataError]:
    """What is missing or of another size, of tars in a store and of their indexes there or in the folder."""
    names = [shard.name for shard in view.shards]
    far = [index_path(Path(name)).as_posix() for name in names if not index_path(view.folder / name).exists()]
    try:
        there = {found.path: found.size for found in view.store.sizes([*names, *far])}
    finally:
        close(view.store)
    problems: list[DataError] = []
    for number, shard in enumerate(view.shards):
        near = index_path(view.tar(number))
        index = index_path(Path(shard.name)).as_posix()
        sizes = {shard.name: there.get(shard.name), index: near.stat().st_size if near.exists() else there.get(index)}
        for name, expected in ((shard.name, (shard.bytes,)), (index, index_bytes(shard.n, fields=shard.fields))):
            size = sizes[name]
            if size is None:
                problems.append(MissingShard(f"{name} is missing in {view.base}"))
            elif size not in expected:
                kind = TruncatedShard if size < expected[0] else CorruptShard
                problems.append(kind(f"{name} in {view.base} has {size} bytes, must have {expected[0]}"))
    return problems


def describe(tar: Path, *, index: Index, folder: Path | None = None) -> Shard:
    """The manifest row of an indexed tar; `folder` is the data set's, that of the tar by default."""
    name = tar.name if folder is None else tar.relative_to(folder).as_posix()
    return Shard(
        name=name, n=len(index), bytes=index.tar_bytes, sha256=index.tar_sha256, fields=index.fields
    )  # fmt: skip


def verify(folder: Path | str, *, part: Part | None = None) -> Verified:
    """Read every byte: sizes, sha256 of every tar, crc32 of every sample; of a part, those of its shards (sizes of all).

    Raises:
        DataError: the class of the first problem, with a line for every problem found.
    """
    view = open_view(folder)
    problems: list[DataError] = []
    numbers: Sequence[int] = range(len(view.shards))
    numbers = numbers if part is None else part.mine(numbers)
    for number in numbers:
        try:
            _verify_shard(view, number)
        except DataError as error:
            problems.append(error)
    close(view.store)
    raise_all(problems)
    read = [view.shards[number] for number in numbers]
    return Verified(
        shards=len(read),
        samples=sum(shard.n for shard in read),
        bytes=sum(shard.bytes for shard in read),
        view_sha256=view.sha256,
    )


def _verify_shard(view: View, number: int) -> None:
    row, index = view.shards[number], view.load_index(number)
    digest, bad = hashlib.sha256(), []
    strange = False
    with downloaded(view.store, row.name) if view.base else view.tar(number).open("rb") as file:
        for sample in range(len(index)):
            start, size = index.span(sample)
            between = file.read(start - file.tell())
            payload = file.read(size)
            digest.update(between)
            digest.update(payload)
            strange |= bool(between)
            if zlib.crc32(payload) != int(index.crc[sample]):
                bad.append(sample)
        while block := file.read(1 << 20):
            digest.update(block)
            strange |= bool(block.strip(b"\0"))
    if bad:
        shown = ", ".join(map(str, bad[:8])) + (", ..." if len(bad) > 8 else "")
        raise CorruptShard(f"shard {row.name} in {view.folder}: crc32 differs in {len(bad)} samples (number {shown})")
    if digest.hexdigest() != row.sha256:
        raise CorruptShard(f"shard {row.name} in {view.folder}: sha256 differs from {MANIFEST}, all samples are intact")
    if strange and read_tally(view.tar(number), accepted=len(index)).is_plain:
        rule = "its index is of a version that did not look there; run `ecdit data index --again`"
        raise CorruptShard(
            f"shard {row.name} in {view.folder}: holds bytes besides its samples, and nothing says what they are: {rule}"
        )


def raise_all(problems: Sequence[DataError]) -> None:
    """The class of the first, a line for every one."""
    if problems:
        raise type(problems[0])("\n".join(str(problem) for problem in problems))

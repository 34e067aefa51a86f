"""`manifest.json`: which shards make a data set. Its sha256 names the data set and goes into the loader state.

Up to `READABLE` shards stand in it (version 1), so that small sets are one file that people read and keep the name
that they have always had; the rows of larger ones are a binary table (`table`), whose sha256 the manifest names
(version 2): 1.2 million rows of JSON take 16 seconds and 900 MB to open. A manifest that is replaced is kept in
`manifests/`, with its table (`history`).

Checks come in two prices. `open_view` looks at existence and sizes only, at every start of a run. `verify` reads
every byte, once after a copy.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from data_pipeline.table import Columns, Rows, Shard, encode, is_inside, open_table
from data_pipeline.tally import read_tally

MANIFEST = "manifest.json"
HISTORY = "manifests"
"""Folder of the tables and of the manifests that were replaced."""
READABLE = 10_000
"""Most shards that are written as JSON."""
VERSIONS = (1, 2)
_STAT_THREADS = 32
_STAT_BLOCK = 4096


@dataclass(frozen=True, kw_only=True)
class View:
    """A data set as training sees it. `sha256` is that of the manifest; `meta` is free information of its writer."""

    folder: Path
    shards: Rows
    sha256: str
    meta: Mapping[str, Any] = field(default_factory=dict)
    base: str = ""
    """URL below which the tars lie, and the indexes that are not in `folder`; none: all in `folder`."""

    @cached_property
    def store(self) -> Store:
        """Of the tars."""
        return open_store(self.base or self.folder)

    def __getstate__(self) -> dict[str, Any]:
        """Without the store: each process opens its own."""
        return {name: value for name, value in self.__dict__.items() if name != "store"}

    @property
    def place(self) -> str:
        """Of the tars, for messages."""
        return self.base or str(self.folder)

    @property
    def num_samples(self) -> int:
        return int(self.shards.columns.samples.sum(dtype=np.int64))

    @property
    def num_bytes(self) -> int:
        """Of all tars."""
        return int(self.shards.columns.bytes.sum(dtype=np.uint64))

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """Every field name that occurs in a shard."""
        return tuple(dict.fromkeys(name for names in self.shards.columns.field_sets for name in names))

    @cached_property
    def shard_sizes(self) -> np.ndarray:
        """int64 (S,) samples per shard"""
        return self.shards.columns.samples.astype(np.int64)

    @cached_property
    def shard_bytes(self) -> np.ndarray:
        """int64 (S,) bytes per tar"""
        return self.shards.columns.bytes.astype(np.int64)

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
            raise CorruptShard(f"index of {row.name} in {self.place}: made for another tar than the manifest names")
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
    content: dict[str, Any] = {"version": 1, "meta": dict(meta or {})} | ({"base": base} if base else {})
    if len(shards) <= READABLE:
        content["shards"] = [asdict(shard) for shard in shards]
    else:
        content |= {"version": 2, "table": _write_table(folder, Columns.of(shards))}
    raw = _dumped(content)
    _keep_previous(folder, unless=raw)
    write_committed(raw, folder / MANIFEST)
    return read_manifest(folder)


def _dumped(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


def _name_of(raw: bytes) -> str:
    """Where the tars lie is no part of a data set's name: the same set in a folder and in a bucket is one."""
    if b'"base"' in raw:
        try:
            content = json.loads(raw)
            if content.pop("base", ""):
                raw = _dumped(content)
        except (ValueError, AttributeError):
            pass  # the reader of manifests says what is wrong with it
    return hashlib.sha256(raw).hexdigest()


def read_manifest(folder: Path | str, *, which: str | None = None, whole: bool = True) -> View:
    """Parse the manifest without looking at the shards.

    Args:
        which: the first 12 digits or more of a manifest's sha256: that one, now or earlier this folder's.
        whole: check the sum of all of a large set's table; else of what every rank needs.

    Raises:
        MissingShard: no manifest in this folder, or none of this name.
        CorruptShard: not a manifest of this version.
        TruncatedShard: its table is shorter than it must be.
    """
    base = ""
    if is_remote(folder):
        base, folder = str(folder).rstrip("/"), copied_manifest(str(folder), earlier=which)
    folder = Path(folder)
    path, raw = _manifest_bytes(folder, which=which, place=base or str(folder))
    try:
        content = json.loads(raw)
        if content["version"] not in VERSIONS:
            known = " and ".join(map(str, VERSIONS))
            raise CorruptShard(f"{path}: version {content['version']}, this program reads {known}")
        meta, base = dict(content.get("meta", {})), base or str(content.get("base", ""))
        if content["version"] == 2:
            columns = _read_table(folder, content["table"], whole=whole)
        else:
            columns = Columns.of([Shard(**{**row, "fields": tuple(row["fields"])}) for row in content["shards"]])
            for row in content["shards"]:
                if not is_inside(row["name"]):
                    raise CorruptShard(f"{path}: shard name {row['name']!r} leads outside of the folder")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptShard(f"{path}: not a manifest ({error!r})") from error
    return View(folder=folder, shards=Rows(columns), sha256=_name_of(raw), meta=meta, base=base)


def open_view(folder: Path | str, *, which: str | None = None, check_files: bool = True) -> View:
    """The data set in a folder, after a check that every shard and index is there with the size it must have.

    Args:
        which: see `read_manifest`.
        check_files: False where another rank does it: of a million shards it is two million questions to the file system.

    Raises:
        MissingShard: naming absent files and the folder.
        TruncatedShard: a tar, an index or the manifest's table is smaller than it must be.
        CorruptShard: it is larger, or the manifest is unreadable.
    """
    view = read_manifest(folder, which=which, whole=check_files)
    if check_files:
        raise_all(check_sizes(view) if view.base else list(_wrong_files(view)))
    return view


def _wrong_files(view: View) -> Iterator[DataError]:
    blocks = [range(i, min(i + _STAT_BLOCK, len(view.shards))) for i in range(0, len(view.shards), _STAT_BLOCK)]
    with ThreadPoolExecutor(_STAT_THREADS if len(blocks) > 1 else 1) as pool:
        for problems in pool.map(lambda block: [p for number in block for p in _wrong_sizes(view, number)], blocks):
            yield from problems


def _wrong_sizes(view: View, number: int) -> Iterator[DataError]:
    shard = view.shards[number]
    tar = view.folder / shard.name
    sizes = index_bytes(shard.n, fields=shard.fields)
    for path, expected in ((tar, (shard.bytes,)), (index_path(tar), sizes)):
        try:
            size = os.stat(path).st_size
        except OSError:
            yield MissingShard(f"{path.name} is missing in {view.folder}")
            continue
        if size not in expected:
            kind = TruncatedShard if size < expected[0] else CorruptShard
            yield kind(f"{path.name} in {view.folder} has {size} bytes, must have {expected[0]}")


def _manifest_bytes(folder: Path, *, which: str | None, place: str) -> tuple[Path, bytes]:
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
        if which is not None and not _name_of(raw).startswith(which):
            path = folder / HISTORY / f"{which[:12]}.json"
            raw = path.read_bytes()
            if not _name_of(raw).startswith(which):
                raise CorruptShard(f"{path}: is not the manifest that its name says; copy it anew")
    except OSError as error:
        if path.parent.name == HISTORY:
            have = ", ".join(sorted(p.stem for p in (folder / HISTORY).glob("*.json"))) or "none"
            have = "none of this name" if place != str(folder) else have  # a store may have no list
            raise MissingShard(f"no manifest {which} of {place}; kept from earlier: {have}") from error
        raise MissingShard(
            f"no {MANIFEST} in {folder}: {error.strerror}; `ecdit data index` makes one for a folder of WebDataset tars"
        ) from error
    return path, raw


def _write_table(folder: Path, columns: Columns) -> dict[str, Any]:
    """The table, under a name of its own: the manifest that is still there keeps the one that it names."""
    raw = encode(columns)
    sha = hashlib.sha256(raw).hexdigest()
    path = folder / HISTORY / f"{sha[:12]}.table"
    path.parent.mkdir(exist_ok=True)
    write_committed(raw, path)
    return {"name": path.relative_to(folder).as_posix(), "sha256": sha, "shards": len(columns), "bytes": len(raw)}


def _read_table(folder: Path, named: Mapping[str, Any], *, whole: bool) -> Columns:
    name, size, shards = str(named["name"]), int(named["bytes"]), int(named["shards"])
    if not is_inside(name):
        raise CorruptShard(f"{folder / MANIFEST}: table {name!r} leads outside of the folder")
    columns = open_table(folder / name, whole=whole)
    if (len(columns), (folder / name).stat().st_size) != (shards, size):
        raise CorruptShard(f"{folder / name}: is the table of another manifest than {folder / MANIFEST}")
    return columns


def _keep_previous(folder: Path, *, unless: bytes) -> None:
    """A copy of the manifest that is about to be replaced, so that a run on it can be told what changed, or go on with it."""
    try:
        raw = (folder / MANIFEST).read_bytes()
    except OSError:
        return
    path = folder / HISTORY / f"{_name_of(raw)[:12]}.json"
    if raw != unless and not path.exists():
        path.parent.mkdir(exist_ok=True)
        write_committed(raw, path)


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
    problems: list[DataError] = _wrong_table(view.folder)
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


def _wrong_table(folder: Path) -> list[DataError]:
    named = json.loads((folder / MANIFEST).read_bytes()).get("table")
    if named is None:
        return []
    with (folder / named["name"]).open("rb") as file:
        same = hashlib.file_digest(file, "sha256").hexdigest() == named["sha256"]
    return [] if same else [CorruptShard(f"{folder / named['name']}: sha256 differs from {MANIFEST}; copy it anew")]


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
        raise CorruptShard(f"shard {row.name} in {view.place}: crc32 differs in {len(bad)} samples (number {shown})")
    if digest.hexdigest() != row.sha256:
        raise CorruptShard(f"shard {row.name} in {view.place}: sha256 differs from {MANIFEST}, all samples are intact")
    if strange and read_tally(view.tar(number), accepted=len(index)).is_plain:
        rule = "its index is of a version that did not look there; run `ecdit data index --again`"
        raise CorruptShard(
            f"shard {row.name} in {view.folder}: holds bytes besides its samples, and nothing says what they are: {rule}"
        )


def raise_all(problems: Sequence[DataError]) -> None:
    """The class of the first, a line for every one."""
    if problems:
        raise type(problems[0])("\n".join(str(problem) for problem in problems))

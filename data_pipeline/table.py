"""The rows of a manifest as columns: of a million shards, 50 bytes each that are mapped into memory and read where they are asked
for, in place of a million Python objects.

File of a large set, little endian, columns one after the other, each from a multiple of 8 bytes on:

    header   8s magic "ECDITTAB" | u32 version | u32 crc32 of the rest of the header, the field sets and the columns `fields` and
             `samples` | u32 crc32 of all that follows those | u32 bytes of the field sets | u64 shards S | u64 samples
             | u64 bytes of the names
    field sets   JSON: a list of lists of names; a shard names one by its number
    fields   u16 (S,) | samples u32 (S,) | name_end u64 (S,) | bytes u64 (S,) | sha256 32 bytes (S,) | names, UTF-8, end to end

The first sum is looked at by every rank at every start (6 bytes a shard), the second by whoever checks the files.
"""

from __future__ import annotations

import json
import mmap
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from data_pipeline.errors import CorruptShard, DataError, MissingShard, TruncatedShard

MAGIC = b"ECDITTAB"
VERSION = 1
_HEADER = struct.Struct("<8sIIIIQQQ")
_FRESH = slice(16, None)
"""Of the header, what its own sum covers: all behind that sum."""
_BLOCK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One row: file name, samples, bytes and sha256 of the tar, field names in the index's order."""

    name: str
    n: int
    bytes: int
    sha256: str
    fields: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Columns:
    """S shards. Arrays may be views of a mapped file."""

    field_sets: tuple[tuple[str, ...], ...]
    fields: np.ndarray
    """uint16 (S,) number of the shard's field set"""
    samples: np.ndarray
    """uint32 (S,)"""
    name_end: np.ndarray
    """uint64 (S,) first byte in `names` behind the shard's name"""
    bytes: np.ndarray
    """uint64 (S,)"""
    sha256: np.ndarray
    """uint8 (S, 32)"""
    names: np.ndarray
    """uint8, UTF-8"""

    @classmethod
    def of(cls, shards: Sequence[Shard]) -> Columns:
        """Raises ValueError where a number does not fit its column or a sum is none."""
        sets: dict[tuple[str, ...], int] = {}
        names = [shard.name.encode() for shard in shards]
        try:
            return cls(
                fields=np.array([sets.setdefault(shard.fields, len(sets)) for shard in shards], np.uint16),
                field_sets=tuple(sets),
                samples=np.array([shard.n for shard in shards], np.uint32),
                name_end=np.cumsum([len(name) for name in names], dtype=np.uint64),
                bytes=np.array([shard.bytes for shard in shards], np.uint64),
                sha256=np.frombuffer(b"".join(_sum(shard) for shard in shards), np.uint8).reshape(-1, 32),
                names=np.frombuffer(b"".join(names), np.uint8),
            )  # fmt: skip
        except OverflowError as error:
            raise ValueError(f"a shard's numbers do not fit a manifest: {error}") from error

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, shard: int) -> str:
        """Raises CorruptShard for one that leads outside of the data set's folder."""
        first = int(self.name_end[shard - 1]) if shard else 0
        try:
            name = self.names[first : int(self.name_end[shard])].tobytes().decode()
        except UnicodeDecodeError:
            name = ""
        if not is_inside(name):
            raise CorruptShard(f"manifest: shard name {name!r} (number {shard}) leads outside of the folder")
        return name


class Made(Sequence[Shard]):
    """A sequence of `Shard`, each made when it is asked for: `row` makes one by its number."""

    def row(self, number: int) -> Shard:
        raise NotImplementedError

    @overload
    def __getitem__(self, shard: int) -> Shard: ...
    @overload
    def __getitem__(self, shard: slice) -> Sequence[Shard]: ...
    def __getitem__(self, shard: int | slice) -> Shard | Sequence[Shard]:
        numbers = range(len(self))[shard]  # IndexError, and numbers from the end
        return self.row(numbers) if isinstance(numbers, int) else [self.row(number) for number in numbers]

    def __iter__(self) -> Iterator[Shard]:
        return (self.row(number) for number in range(len(self)))


class Rows(Made):
    """The same as a sequence of `Shard`."""

    def __init__(self, columns: Columns) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns)

    def row(self, number: int) -> Shard:
        c = self.columns
        return Shard(
            name=c.name(number), n=int(c.samples[number]), bytes=int(c.bytes[number]),
            sha256=c.sha256[number].tobytes().hex(), fields=c.field_sets[int(c.fields[number])],
        )  # fmt: skip

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(Shard.__eq__, self, other))

    def __hash__(self) -> int:
        return hash((len(self), self.columns.samples.tobytes()))


def is_inside(name: str) -> bool:
    """Whether a shard's name stays in the folder of its data set."""
    return bool(name) and not name.startswith("/") and "\0" not in name and ".." not in name.split("/")


def encode(columns: Columns) -> bytes:
    """The file's content."""
    sets = _padded(json.dumps(columns.field_sets).encode())
    checked = sets + _padded(_little(columns.fields, "<u2")) + _padded(_little(columns.samples, "<u4"))
    rest = (
        _little(columns.name_end, "<u8")
        + _little(columns.bytes, "<u8")
        + columns.sha256.tobytes()
        + columns.names.tobytes()
    )
    numbers = (len(sets), len(columns), int(columns.samples.sum(dtype=np.int64)), len(columns.names))
    header = _HEADER.pack(MAGIC, VERSION, 0, zlib.crc32(rest), *numbers)
    crc = zlib.crc32(checked, zlib.crc32(header[_FRESH]))
    return _HEADER.pack(MAGIC, VERSION, crc, zlib.crc32(rest), *numbers) + checked + rest


def open_table(path: Path, *, whole: bool) -> Columns:
    """Map a table.

    Args:
        whole: read all of it once and check its sum too; else size, header and numbers of samples.

    Raises:
        MissingShard: no such file.
        TruncatedShard: shorter than its header says.
        CorruptShard: no table, of another version, longer, or a sum differs.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if size < _HEADER.size:
                raise TruncatedShard(f"{path}: {size} bytes are no table of shards")
            raw = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            columns, rest_at, rest_crc = _columns(raw, path=path)
            if whole and _crc_of(path, first=rest_at) != rest_crc:
                raise _changed(path)
    except OSError as error:
        raise MissingShard(f"table of shards {path.name} in {path.parent}: {error.strerror}") from error
    return columns


def _columns(raw: mmap.mmap, *, path: Path) -> tuple[Columns, int, int]:
    """The columns, where the part begins that was not looked at, and its sum."""
    magic, version, crc, rest_crc, sets_bytes, shards, samples, names_bytes = _HEADER.unpack_from(raw)
    if magic != MAGIC:
        raise CorruptShard(f"{path}: not a table of shards")
    if version != VERSION:
        raise CorruptShard(f"{path}: version {version}, this program reads {VERSION}")
    fields_at = _HEADER.size + sets_bytes
    samples_at = fields_at + _up(2 * shards)
    rest_at = samples_at + _up(4 * shards)
    end = rest_at + 48 * shards + names_bytes
    if len(raw) != end:
        kind: type[DataError] = TruncatedShard if len(raw) < end else CorruptShard
        raise kind(f"{path}: {len(raw)} bytes, its header says {end}: cut, or another file")
    if zlib.crc32(raw[_HEADER.size : rest_at], zlib.crc32(raw[: _HEADER.size][_FRESH])) != crc:
        raise _changed(path)
    try:
        sets = tuple(tuple(map(str, names)) for names in json.loads(raw[_HEADER.size : fields_at].rstrip(b"\0")))
    except (ValueError, TypeError) as error:
        raise _changed(path) from error
    view = memoryview(raw)

    def column(dtype: str, first: int, count: int) -> np.ndarray:
        return np.frombuffer(view, dtype, count=count, offset=first)

    columns = Columns(
        field_sets=sets,
        fields=column("<u2", fields_at, shards),
        samples=column("<u4", samples_at, shards),
        name_end=column("<u8", rest_at, shards),
        bytes=column("<u8", rest_at + 8 * shards, shards),
        sha256=column("u1", rest_at + 16 * shards, 32 * shards).reshape(-1, 32),
        names=column("u1", rest_at + 48 * shards, names_bytes),
    )
    if shards and (int(columns.samples.sum(dtype=np.int64)) != samples or int(columns.fields.max()) >= len(sets)):
        raise _changed(path)
    return columns, rest_at, rest_crc


def _crc_of(path: Path, *, first: int) -> int:
    """Read in blocks: mapped pages would count as this process's memory."""
    crc = 0
    with path.open("rb") as file:
        file.seek(first)
        while block := file.read(_BLOCK):
            crc = zlib.crc32(block, crc)
    return crc


def _changed(path: Path) -> CorruptShard:
    return CorruptShard(
        f"{path}: changed since it was written (checksum differs); run `ecdit data index`, or copy it anew"
    )


def _sum(shard: Shard) -> bytes:
    digest = bytes.fromhex(shard.sha256)
    if len(digest) != 32:
        raise ValueError(f"shard {shard.name}: sha256 {shard.sha256!r} has not 64 digits")
    return digest


def _little(column: np.ndarray, dtype: str) -> bytes:
    return column.astype(dtype).tobytes()


def _up(size: int) -> int:
    return -(-size // 8) * 8


def _padded(content: bytes) -> bytes:
    return content + bytes(_up(len(content)) - len(content))

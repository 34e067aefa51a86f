"""Tar blocks: the few hundred bytes of the format that shards use, read without the `tarfile` module.

`tarfile` builds an object of about 50 us for every member and hides offsets; the index needs offsets, and the
reader splits one sample's bytes millions of times. Understood: ustar, pax (`x` path and size, `g` skipped) and
GNU long names. Refused: links, devices and sparse files, which no data set needs.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from data_pipeline.errors import BadMember, CorruptShard, TruncatedShard

BLOCK = 512
ZERO_BLOCK = bytes(BLOCK)
ALLOWED_SUFFIXES = ("jpg", "jpeg", "png", "webp", "npy", "txt", "json")
"""The last part of a member's name. An allow-list: `.pyd` and `.pkl` run code in readers that unpickle them."""

Buffer = bytes | memoryview | mmap.mmap
_REGULAR = (b"0", b"\0", b"7")
_SKIPPED = (b"5", b"g")


@dataclass(frozen=True, slots=True)
class Member:
    """One file of a tar; offsets and sizes in bytes from where the walk began."""

    name: str
    start: int
    """first header block, extended headers included"""
    data: int
    size: int

    @property
    def end(self) -> int:
        """First byte after the padded data."""
        return padded(self.data + self.size)


def padded(num_bytes: int) -> int:
    """`num_bytes` rounded up to whole 512-byte blocks."""
    return -(-num_bytes // BLOCK) * BLOCK


def walk(buffer: Buffer, *, shard: str) -> Iterator[Member]:
    """Members of a tar of unknown origin, in file order, until an end-of-archive block or the last byte.

    Raises:
        TruncatedShard: a header or the data of a member goes past the end of the buffer.
        CorruptShard: a header's own checksum or a number in it is wrong.
        BadMember: a link, device or sparse file.
    """
    return _walk(buffer, shard=shard, size_of=_checked_size)


def walk_proven(buffer: Buffer, *, shard: str) -> Iterator[Member]:
    """`walk` for one sample's range whose crc32 has been compared: header checksums would only be counted twice."""
    return _walk(buffer, shard=shard, size_of=_size)


def _walk(buffer: Buffer, *, shard: str, size_of: Callable[[bytes, str, int], int]) -> Iterator[Member]:
    end = len(buffer)
    position, start, long_name, long_size = 0, -1, "", -1
    while position < end:
        header = bytes(buffer[position : position + BLOCK])
        if header == ZERO_BLOCK:
            return
        if len(header) < BLOCK:
            raise TruncatedShard(f"shard {shard}: ends inside a header at byte {position} of {end}")
        start = position if start < 0 else start
        kind, size = header[156:157], size_of(header, shard, position)
        data = position + BLOCK
        if kind in _REGULAR and long_size >= 0:
            size = long_size
        if data + size > end:
            raise TruncatedShard(f"shard {shard}: ends at byte {end}, inside {_name(header)!r} (to byte {data + size})")
        if kind in _REGULAR:
            yield Member(name=long_name or _name(header), start=start, data=data, size=size)
            start, long_name, long_size = -1, "", -1
        elif kind == b"x":
            records = _pax_records(bytes(buffer[data : data + size]), shard=shard)
            long_name = records.get("path", long_name)
            if "size" in records:
                long_size = _natural(records["size"].encode(), 10, shard=shard, position=position)
        elif kind == b"L":
            long_name = bytes(buffer[data : data + size]).rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif kind in _SKIPPED:
            start, long_name, long_size = -1, "", -1
        else:
            raise BadMember(f"shard {shard}: member {_name(header)!r} is no plain file (tar type {kind!r})")
        position = padded(data + size)


def has_end_marker(buffer: Buffer, *, at: int) -> bool:
    """True when an end-of-archive block stands at byte `at`: the tar was closed by its writer."""
    return bytes(buffer[at : at + BLOCK]) == ZERO_BLOCK


def split_name(name: str, *, shard: str) -> tuple[str, str]:
    """(key, field) of a member name, split at the first dot of its base name: `a/0001.latent.npy`.

    Raises:
        BadMember: absolute names, names with `..`, no key, or a suffix outside `ALLOWED_SUFFIXES`.
    """
    plain = name.removeprefix("./")
    folder, _, base = plain.rpartition("/")
    stem, _, field = base.partition(".")
    field = field.lower()
    if any("\ud800" <= letter <= "\udfff" for letter in name) or not field.isprintable():
        raise BadMember(f"shard {shard}: member name {name!r} is not UTF-8 or holds control characters")
    if name.startswith("/") or ".." in plain.split("/") or "\\" in name:
        raise BadMember(f"shard {shard}: member {name!r} points outside of its folder (absolute or '..')")
    if not stem or field.rpartition(".")[2] not in ALLOWED_SUFFIXES:
        raise BadMember(f"shard {shard}: member {name!r} has a refused suffix; allowed: {' '.join(ALLOWED_SUFFIXES)}")
    return (f"{folder}/{stem}" if folder else stem), field


def split_proven_name(name: str) -> tuple[str, str]:
    """`split_name` for a name that passed it when the index was made."""
    plain = name.removeprefix("./")
    dot = plain.index(".", plain.rfind("/") + 1)
    return plain[:dot], plain[dot + 1 :].lower()


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0":  # GNU tar writes "ustar  \0" and puts other things at the prefix
        prefix = header[345:500].split(b"\0", 1)[0]
        name = prefix + b"/" + name if prefix else name
    return name.decode("utf-8", "surrogateescape")


def _size(header: bytes, shard: str, position: int) -> int:
    """Bytes of the member's data."""
    if header[124] & 0x80:  # base 256, for sizes above 8 GiB
        return int.from_bytes(header[125:136], "big")
    return _natural(header[124:136].rstrip(b"\0 ") or b"0", 8, shard=shard, position=position)


def _checked_size(header: bytes, shard: str, position: int) -> int:
    """`_size`, after the header's checksum proved that this is a header."""
    told = _natural(header[148:156].strip(b"\0 ") or b"0", 8, shard=shard, position=position)
    # The sum counts the checksum field itself as eight spaces.
    if sum(header) - sum(header[148:156]) + 256 != told:
        raise CorruptShard(f"shard {shard}: no valid tar header at byte {position}")
    return _size(header, shard, position)


def _natural(digits: bytes, base: int, *, shard: str, position: int) -> int:
    """A number that is not negative: a size of -512 would send the walk round in circles."""
    try:
        number = int(digits, base)
    except ValueError:
        number = -1
    if number < 0:
        raise CorruptShard(f"shard {shard}: no valid tar header at byte {position}")
    return number


def _pax_records(payload: bytes, *, shard: str) -> dict[str, str]:
    """`"12 path=abc\\n"` repeated; the number counts the whole record."""
    records, position = {}, 0
    try:
        while position < len(payload):
            length = int(payload[position:].split(b" ", 1)[0])
            record = payload[position : position + length]
            keyword, _, value = record.split(b" ", 1)[1].rstrip(b"\n").partition(b"=")
            records[keyword.decode()] = value.decode("utf-8", "surrogateescape")
            position += length if length > 0 else len(payload)
        return records
    except (ValueError, IndexError):
        raise CorruptShard(f"shard {shard}: unreadable pax header") from None

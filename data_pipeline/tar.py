"""Tar blocks: the few hundred bytes of the format that shards use, read without the `tarfile` module.

`tarfile` builds an object of about 50 us for every member, hides offsets, and stops without a word at the first
thing that it does not like. Here every byte of a file is a member, something to leave out, or damage: `survey` says
which (`walk_proven` is for one sample's range that has been surveyed). Understood: ustar, pax (`x` path and size)
and GNU long names.
"""

from __future__ import annotations

import mmap
from collections.abc import Container, Iterator
from dataclasses import dataclass
from functools import lru_cache

from data_pipeline.errors import BadMember, CorruptShard

BLOCK = 512
ZERO_BLOCK = bytes(BLOCK)
ALLOWED_SUFFIXES = ("jpg", "jpeg", "png", "webp", "npy", "txt", "json")
"""The last part of a member's name. An allow-list: `.pyd` and `.pkl` run code in readers that unpickle them."""

MAGIC = b"ustar"
"""In the headers of POSIX and GNU tar alike. Headers without it (v7, of 1979) are read, but not looked for behind damage."""
RECORD = 20 * BLOCK

Buffer = bytes | memoryview | mmap.mmap
_REGULAR = (b"0", b"\0", b"7")
_PLAIN = _REGULAR[0][0]
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")
_KINDS = {b"1": "hard link", b"2": "symbolic link", b"3": "device", b"4": "device", b"6": "pipe", b"S": "sparse file"}


@dataclass(frozen=True, slots=True)
class Member:
    """One plain file of a tar; offsets and sizes in bytes."""

    name: str
    start: int
    """first header block, extended headers included"""
    data: int
    size: int

    @property
    def end(self) -> int:
        """First byte after the padded data."""
        return padded(self.data + self.size)


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Part of a tar that is no plain file."""

    reason: str
    name: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Damage:
    """Bytes that are no tar."""

    kind: str
    """`after_end`: data behind an end-of-archive block; `header`: one whose checksum is wrong; `overwritten`: no header
    where one must be; `cut`: the file ends too early; `zero_tail`: more zeros at the end than a writer leaves"""
    start: int
    end: int
    words: str
    name: str = ""
    """of the member that was cut, where it is known"""


def padded(num_bytes: int) -> int:
    """`num_bytes` rounded up to whole 512-byte blocks."""
    return -(-num_bytes // BLOCK) * BLOCK


def survey(buffer: Buffer) -> Iterator[Member | LeftOut | Damage]:
    """All of a tar of unknown origin, in file order.

    After damage the survey goes on at the next block that is a whole header: magic, checksum and numbers. A tar inside
    a damaged member could be taken for more of this one; nothing else can.
    """
    position, end = 0, len(buffer)
    while position < end:
        block = bytes(buffer[position : position + BLOCK])
        if block == ZERO_BLOCK:
            after = _first_data(buffer, position)
            if after is None:
                yield from _padding(position, end)
                return
            # What ended well ends with zeros to the last byte.
            stop = _next_header(buffer, after // BLOCK * BLOCK)
            yield Damage(
                kind="after_end",
                start=position,
                end=stop,
                words=f"data behind an end-of-archive block at byte {position}",
            )
            position = stop
            continue
        try:
            found = _one(buffer, position)
        except _NoHeaderError:
            whole = block[257:262] == MAGIC
            stop = _next_header(buffer, position + BLOCK)
            yield Damage(
                kind="header" if whole else "overwritten",
                start=position,
                end=stop,
                words=f"no valid tar header at byte {position}",
            )
            position = stop
            continue
        except _CutError as error:
            yield Damage(kind="cut", start=position, end=end, words=str(error), name=error.name)
            return
        position = found.end
        yield found
    yield Damage(kind="cut", start=end, end=end, words=f"ends at byte {end} without an end-of-archive block")


def walk_proven(buffer: Buffer, *, shard: str) -> Iterator[Member]:
    """Members of one sample's range whose crc32 has been compared: header checksums would only be counted twice.

    Raises CorruptShard: an index that was made for something else.
    """
    position, end = 0, len(buffer)
    while position < end:
        try:
            found = _one(buffer, position, proven=True)
        except (_NoHeaderError, _CutError):
            raise CorruptShard(f"shard {shard}: no valid tar header at byte {position} of a sample") from None
        position = found.end
        if isinstance(found, Member):
            yield found


def first_name(begin: Buffer) -> str | None:
    """Of the first member of one sample, from the first bytes of its range; None where that takes more of them."""
    try:
        found = _one(begin, 0, proven=True)
    except _CutError as error:
        return error.name or None
    except _NoHeaderError:
        return None
    return found.name if isinstance(found, Member) else None


def proven_fields(whole: memoryview, *, wanted: Container[str], shard: str) -> tuple[str, dict[str, memoryview]]:
    """(key, field -> content) of one sample's range whose crc32 has been compared. Members that belong to another key, or that are
    not wanted, are left out.

    Raises CorruptShard: an index that was made for something else."""
    key, prefix, fields, position, end = "", b"", dict[str, memoryview](), 0, len(whole)
    while position < end:
        header = bytes(whole[position : position + BLOCK])
        # Plain files with a name of up to 100 bytes: what nearly all are. Where anything is unusual, the walk that knows it all.
        if len(header) < BLOCK or header[156] != _PLAIN or header[345]:
            return _walked_fields(whole, wanted=wanted, shard=shard)
        try:
            data, size = position + BLOCK, int(header[124:135], 8)
        except ValueError:
            return _walked_fields(whole, wanted=wanted, shard=shard)
        if data + size > end or size < 0:
            return _walked_fields(whole, wanted=wanted, shard=shard)
        name = header[: header.find(b"\0", 0, 100)] if header[99] == 0 else header[:100]
        if not prefix:
            key, field = split_proven_name(_name(header))
            prefix = name[: name.find(b".", name.rfind(b"/") + 1) + 1]
            if not prefix:
                return _walked_fields(whole, wanted=wanted, shard=shard)
        else:
            rest = name[len(prefix) :]
            field = _field(rest) if name.startswith(prefix) and b"/" not in rest else ""
        if field in wanted:
            fields[field] = whole[data : data + size]
        position = padded(data + size)
    return key, fields


@lru_cache(maxsize=1024)
def _field(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape").lower()


def _walked_fields(whole: memoryview, *, wanted: Container[str], shard: str) -> tuple[str, dict[str, memoryview]]:
    key, fields = "", dict[str, memoryview]()
    for member in walk_proven(whole, shard=shard):
        of, field = split_proven_name(member.name)
        key = key or of
        if of == key and field in wanted:
            fields[field] = whole[member.data : member.data + member.size]
    return key, fields


class _NoHeaderError(Exception):
    """These bytes are no header."""


class _CutError(Exception):
    """The file ends inside a header or a member."""

    def __init__(self, words: str, *, name: str = "") -> None:
        super().__init__(words)
        self.name = name


def _one(buffer: Buffer, position: int, *, proven: bool = False) -> Member | LeftOut:
    """The member that begins at a byte, with its extended headers. Raises _NoHeaderError, _CutError."""
    start, end, long_name, long_size = position, len(buffer), "", -1
    while True:
        header = bytes(buffer[position : position + BLOCK])
        if len(header) < BLOCK:
            raise _CutError(f"ends inside a header at byte {position} of {end}", name=long_name)
        if header == ZERO_BLOCK:  # an extended header that belongs to nothing
            raise _NoHeaderError
        kind, size = header[156:157], _size(header) if proven else _checked_size(header)
        plain = kind in _REGULAR
        data, size = position + BLOCK, long_size if plain and long_size >= 0 else size
        name = long_name or _name(header)
        if kind in _WITHOUT_DATA:
            size = 0
        if data + size > end:
            raise _CutError(f"ends at byte {end}, inside {name!r} (to byte {data + size})", name=name if plain else "")
        if plain:
            return Member(name=name, start=start, data=data, size=size)
        if kind == b"x":
            records = _pax_records(bytes(buffer[data : data + size]))
            long_name = records.get("path", long_name)
            long_size = _natural(records["size"].encode(), 10) if "size" in records else long_size
        elif kind == b"L":
            long_name = bytes(buffer[data : data + size]).rstrip(b"\0").decode("utf-8", "surrogateescape")
            if not long_name:
                raise _NoHeaderError
        elif kind != b"K":
            why = (
                "folder"
                if kind == b"5"
                else "global header"
                if kind == b"g"
                else f"no plain file ({_KINDS.get(kind, 'tar type ' + repr(kind)[1:])})"
            )
            return LeftOut(reason=why, name=name, start=start, end=padded(data + size))
        position = padded(data + size)


def _first_data(buffer: Buffer, position: int) -> int | None:
    """The first byte from here on that is not zero."""
    step = 1 << 16
    for at in range(position, len(buffer), step):
        if (piece := bytes(buffer[at : at + step])).strip(b"\0"):
            return at + len(piece) - len(piece.lstrip(b"\0"))
    return None


def _next_header(buffer: Buffer, position: int) -> int:
    """The first block from here on that begins a member; the end where there is none."""
    end = len(buffer)
    while position + BLOCK <= end:
        if bytes(buffer[position + 257 : position + 262]) == MAGIC:
            try:
                _checked_size(bytes(buffer[position : position + BLOCK]))
            except _NoHeaderError:
                pass
            else:
                return position
        position += BLOCK
    return end


def _padding(position: int, end: int) -> Iterator[Damage]:
    """Zeros to the end. Writers close with two blocks and fill a record: 20 blocks, or a power of two of them (tape).
    More than that was something else once."""
    zeros = end - position
    records = [RECORD, *(BLOCK << power for power in range(7, 16))]
    if not any(zeros <= 2 * BLOCK + size and (end % size == 0 or zeros <= 2 * BLOCK) for size in records):
        yield Damage(
            kind="zero_tail",
            start=position,
            end=end,
            words=f"{zeros} zero bytes at the end (a record of tar has {RECORD})",
        )


def split_name(name: str) -> tuple[str, str]:
    """(key, field) of a member name, split at the first dot of its base name: `a/0001.latent.npy`.

    Raises BadMember with why this is nothing for a data set: a suffix outside `ALLOWED_SUFFIXES`, no key, a
    name that leads outside.
    """
    plain = name.removeprefix("./")
    folder, _, base = plain.rpartition("/")
    stem, _, field = base.partition(".")
    field = field.lower()
    if any("\ud800" <= letter <= "\udfff" for letter in name) or not field.isprintable():
        raise BadMember("name that is not UTF-8 or holds control characters")
    if name.startswith("/") or ".." in plain.split("/") or "\\" in name:
        raise BadMember("name that leads outside of its folder")
    suffix = field.rpartition(".")[2]
    if not stem:
        raise BadMember("hidden file")
    if suffix not in ALLOWED_SUFFIXES:
        raise BadMember(f"suffix .{suffix}" if suffix else "no suffix")
    return (f"{folder}/{stem}" if folder else stem), field


def split_proven_name(name: str) -> tuple[str, str]:
    """`split_name` without its rules, for a name that passed them when the index was made."""
    plain = name.removeprefix("./")
    dot = plain.find(".", plain.rfind("/") + 1)
    return (plain[:dot], plain[dot + 1 :].lower()) if dot >= 0 else (plain, "")


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0":  # GNU tar writes "ustar  \0" and puts other things at the prefix
        prefix = header[345:500].split(b"\0", 1)[0]
        name = prefix + b"/" + name if prefix else name
    return name.decode("utf-8", "surrogateescape")


def _size(header: bytes) -> int:
    """Bytes of the member's data."""
    if header[124] & 0x80:  # base 256, for sizes above 8 GiB
        return int.from_bytes(header[125:136], "big")
    return _natural(header[124:136].rstrip(b"\0 ") or b"0", 8)


def _checked_size(header: bytes) -> int:
    """`_size`, after the header's checksum proved that this is a header."""
    told = _natural(header[148:156].strip(b"\0 ") or b"0", 8)
    # The sum counts the checksum field itself as eight spaces.
    if sum(header) - sum(header[148:156]) + 256 != told:
        raise _NoHeaderError
    return _size(header)


def _natural(digits: bytes, base: int) -> int:
    """A number that is not negative: a size of -512 would send the walk round in circles."""
    try:
        number = int(digits, base)
    except ValueError:
        number = -1
    if number < 0:
        raise _NoHeaderError
    return number


def _pax_records(payload: bytes) -> dict[str, str]:
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
        raise _NoHeaderError from None

"""Samples of arrays read straight into their slots: one `preadv` puts latent and text where the batch wants them, the rest aside.

The plain way reads a sample into a buffer and copies its arrays out. Here the place of the arrays is foretold: samples of the
same size mostly lie alike, member by member. What was read then proves it: the range's crc32 is that of the index, and the
members' headers, which never lie in a slot, are those of the samples that were foretold from. A sample of which anything is
not so, that has no caption or holds NaN, goes the plain way, which knows what is wrong with it; so whatever this way has left
in its slot is written over, and errors, counts and substitutes are the plain way's.
"""

from __future__ import annotations

import math
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from data_pipeline.assemble import ArrayShapes, BatchBuffer, Fields
from data_pipeline.captions import CaptionRule, NoCaptionError
from data_pipeline.checksum import crc32
from data_pipeline.decode import all_finite, npy_header
from data_pipeline.errors import BadCaption, CorruptShard, Where
from data_pipeline.reader import Value
from data_pipeline.readers import Reader
from data_pipeline.tar import BLOCK, Member, padded, walk_proven

_RUN_BYTES = 128 << 10
"""Slots of about so many bytes are looked through for NaN at once, while they are in the cache; a call costs as much as 100 KB."""


class Try(NamedTuple):
    """What goes into a slot next."""

    slot: int
    shard: int
    sample: int


class _Text(NamedTuple):
    field: str
    start: int
    """of its content, among what is read aside"""
    room: int
    """of its padded content"""


class _Hole(NamedTuple):
    """Content of an array, without its npy header: where it lies in the sample."""

    field: str
    start: int
    end: int


@dataclass(frozen=True, slots=True, eq=False)
class _Layout:
    """How samples of one size lie. What is no hole is read aside, piece by piece; both structs are of those bytes."""

    num_bytes: int
    holes: tuple[tuple[int, _Hole], ...]
    """In the order in which they lie, each with its place among the pieces of a read."""
    fixed: struct.Struct
    equal: tuple[bytes, ...]
    """What `fixed` reads: of each member its type and the first byte of a name's prefix, of an array its size and npy header."""
    named: struct.Struct
    """The members' names, and the sizes of those that are no arrays."""
    members: tuple[tuple[bytes, _Text | None], ...]
    """Of each what stands behind the key's dot, and where its content is; None is an array."""
    tokens: int


class _Aside:
    """A thread's own bytes for what is no array in samples of a layout."""

    def __init__(self, layout: _Layout) -> None:
        self.content = bytearray(layout.num_bytes - sum(hole.end - hole.start for _, hole in layout.holes))
        self.whole = memoryview(self.content)
        self.pieces, start, last = list[memoryview](), 0, 0
        """What a read fills; nothing stands for a hole."""
        for _, hole in layout.holes:
            end = start + hole.start - last
            self.pieces += [self.whole[start:end], self.whole[:0]]
            start, last = end, hole.end
        self.pieces.append(self.whole[start:])


class _Asides(threading.local):
    def __init__(self) -> None:
        self.of: dict[_Layout, _Aside] = {}


class Straight:
    """Thread-safe. For streams of `Fields` without images, from local files; `serves` says so."""

    def __init__(self, reader: Reader, *, fields: Fields, shapes: ArrayShapes, captions: CaptionRule) -> None:
        self._reader, self._fields, self._shapes, self._rule = reader, fields, shapes, captions
        self._layouts: dict[tuple[int, int, tuple[str, ...]], _Layout | None] = {}
        self._asides = _Asides()
        self._latent_bytes = self._text_bytes = 0
        if shapes.latent is not None:
            self._latent_bytes = math.prod(shapes.latent[0]) * shapes.latent[1].itemsize
        if shapes.text is not None:
            self._token_bytes = shapes.text[0] * shapes.text[1].itemsize
            self._text_bytes = fields.text_len * self._token_bytes
        self._run = max(1, _RUN_BYTES // max(1, self._latent_bytes + self._text_bytes))

    @staticmethod
    def serves(reader: Reader, *, fields: Fields) -> bool:
        return not reader.is_remote and not fields.images and bool(fields.latents or fields.text)

    def fill(self, buffer: BatchBuffer, tries: Sequence[Try]) -> list[Try]:
        """Fills the slots of samples that lie as foretold; gives back the others, in their order."""
        rest: list[Try] = []
        memory = _flat(buffer.latents), _flat(buffer.text)
        for first in range(0, len(tries), self._run):
            took, went = 0, []
            for one in tries[first : first + self._run]:
                if num_bytes := self._one(buffer, one, *memory):
                    took += num_bytes
                    went.append(one)
                else:
                    rest.append(one)
            if not _finite(buffer, went):
                rest += [one for one in went if not _finite(buffer, [one])]
            self._reader.count(took)
        return sorted(rest)

    def _one(self, buffer: BatchBuffer, one: Try, latents: memoryview | None, text: memoryview | None) -> int:
        """Bytes of the sample that is now in its slot; 0 for one that must go the plain way."""
        slot, shard, sample = one
        index = self._reader.index(shard)
        start, num_bytes = index.span(sample)
        crc = int(index.crc[sample])
        # The index names the fields in the order of its shard: sources that were written otherwise keep layouts of their own.
        text_bytes = 0 if text is None else index.bytes_of(sample, self._fields.text or "")
        alike = num_bytes, text_bytes, index.fields
        try:
            layout = self._layouts[alike]
        except KeyError:
            layout = self._layouts[alike] = self._learn(shard, start=start, num_bytes=num_bytes, crc=crc)
        if layout is None:
            return 0
        aside = self._asides.of.get(layout) or self._asides.of.setdefault(layout, _Aside(layout))
        pieces = aside.pieces[:]
        for place, hole in layout.holes:
            if hole.field == self._fields.latents and latents is not None:
                at = slot * self._latent_bytes
                pieces[place] = latents[at : at + self._latent_bytes]
            elif text is not None:
                at = slot * self._text_bytes
                pieces[place] = text[at : at + hole.end - hole.start]
        if not self._read(shard, start=start, pieces=pieces, num_bytes=num_bytes, crc=crc):
            return 0
        if (found := _proven(layout, aside)) is None:
            self._layouts[alike] = None
            return 0
        key, fields = found
        caption = None
        if self._fields.captions:
            try:
                caption = self._rule.choose(fields, where=Where("", key, int(buffer.position[slot])))
            except (BadCaption, NoCaptionError):
                return 0
        buffer.filled(slot, key=key, caption=caption, tokens=layout.tokens)
        return num_bytes

    def _read(self, shard: int, *, start: int, pieces: Sequence[memoryview], num_bytes: int, crc: int) -> bool:
        """Whether all of it came, and is what the index says."""
        try:
            if self._reader.scatter(shard, start=start, into=pieces) != num_bytes:
                return False
        except OSError:
            return False  # the plain way tries again, and counts it
        found = 0
        for piece in pieces:
            found = crc32(piece, found)
        return found == crc

    def _learn(self, shard: int, *, start: int, num_bytes: int, crc: int) -> _Layout | None:
        """How a sample lies; None where that is nothing to foretell from."""
        whole = memoryview(bytearray(num_bytes))
        if not self._read(shard, start=start, pieces=[whole], num_bytes=num_bytes, crc=crc):
            return None
        members = _plain_members(whole)
        prefix = _prefix(_name(whole, members[0])) if members else b""
        if not prefix or not all(_name(whole, member).startswith(prefix) for member in members):
            return None
        suffixes = tuple(_name(whole, member)[len(prefix) :] for member in members)
        names = [suffix.decode("utf-8", "surrogateescape").lower() for suffix in suffixes]
        arrays = {name for name in (self._fields.latents, self._fields.text) if name is not None}
        if len(set(names)) < len(names) or not arrays <= set(names) or any("/" in name for name in names):
            return None
        fixed, named, equal, at = "", "", list[bytes](), 0
        holes, texts, tokens, skipped = list[_Hole](), list[_Text | None](), 0, 0
        for name, member in zip(names, members, strict=True):
            header = bytes(whole[member.data - BLOCK : member.data])
            before = member.data - BLOCK - at
            at = member.data
            if name in arrays:
                if (found := self._foretold(whole[member.data : member.data + member.size], name)) is None:
                    return None
                rows, first = found
                tokens = rows if name == self._fields.text else tokens
                fixed += f"{before}x124x12s20xs188xs166x{first}s"
                named += f"{before}x100s412x{first}x"
                equal += [header[124:136], header[156:157], header[345:346], bytes(whole[at : at + first])]
                texts.append(None)
                holes.append(_Hole(name, at + first, at + member.size))
                skipped += member.size - first
                at += member.size
            else:
                fixed += f"{before}x156xs188xs166x"
                named += f"{before}x100s24x12s376x"
                equal += [header[156:157], header[345:346]]
                texts.append(_Text(name, at - skipped, padded(member.size)))
        return _Layout(
            num_bytes=num_bytes, holes=tuple((2 * n + 1, hole) for n, hole in enumerate(holes)),
            fixed=struct.Struct("<" + fixed), equal=tuple(equal), named=struct.Struct("<" + named),
            members=tuple(zip(suffixes, texts, strict=True)), tokens=tokens,
        )  # fmt: skip

    def _foretold(self, payload: memoryview, name: str) -> tuple[int, int] | None:
        """(rows, bytes of the npy header) of an array that fits its slot as it lies."""
        try:
            shape, fortran, dtype, first = npy_header(payload)
        except ValueError:
            return None
        if name == self._fields.latents:
            fits, wanted = (shape, dtype) == self._shapes.latent, self._latent_bytes
        else:
            fits = len(shape) == 2 and (shape[1], dtype) == self._shapes.text and 0 < shape[0] <= self._fields.text_len
            wanted = shape[0] * self._token_bytes if fits else 0
        return (shape[0], first) if fits and not fortran and len(payload) == first + wanted else None


def _proven(layout: _Layout, aside: _Aside) -> tuple[str, dict[str, Value]] | None:
    """(key, what is no array) of a sample whose headers are here and whose crc32 was compared; None: it lies otherwise."""
    if layout.fixed.unpack_from(aside.content) != layout.equal:
        return None
    found = layout.named.unpack_from(aside.content)
    prefix, fields, number = _prefix(found[0]), dict[str, Value](), 0
    if not prefix:
        return None
    for suffix, text in layout.members:
        if found[number].rstrip(b"\0") != prefix + suffix:
            return None
        number += 1
        if text is not None:
            size = _octal(found[number])
            number += 1
            if size is None or not text.room - BLOCK < size <= text.room:
                return None
            fields[text.field] = aside.whole[text.start : text.start + size]
    return prefix[:-1].decode("utf-8", "surrogateescape").removeprefix("./"), fields


def _plain_members(whole: memoryview) -> list[Member]:
    """All members of a sample, if each has one header of the usual kind and nothing lies between; else none."""
    members, position = [], 0
    try:
        for member in walk_proven(whole, shard=""):
            header = whole[position : position + BLOCK]
            if (
                member.data != position + BLOCK
                or header[156:157] != b"0"
                or header[345]
                or _octal(bytes(header[124:136])) is None
            ):
                return []
            members.append(member)
            position = member.end
    except CorruptShard:
        return []
    return members if position == len(whole) else []


def _name(whole: memoryview, member: Member) -> bytes:
    return bytes(whole[member.data - BLOCK : member.data - BLOCK + 100]).rstrip(b"\0")


def _prefix(name: bytes) -> bytes:
    """Up to the dot behind the key, as `split_proven_name` has it; empty where there is none."""
    return name[: name.find(b".", name.rfind(b"/") + 1) + 1]


@lru_cache(maxsize=4096)
def _octal(size: bytes) -> int | None:
    """A member's size; None for what is not eleven digits and an end."""
    try:
        return int(size[:11], 8) if size[:11].isdigit() and size[11] in b"\0 " else None
    except ValueError:
        return None


def _flat(array: np.ndarray | None) -> memoryview | None:
    return None if array is None else array.reshape(-1).view(np.uint8).data


def _finite(buffer: BatchBuffer, went: Sequence[Try]) -> bool:
    if not went:
        return True
    first, last = went[0].slot, went[-1].slot + 1
    # Slots between them that did not go hold what they hold: then each is looked at alone.
    spans = [slice(first, last)] if last - first == len(went) else [slice(one.slot, one.slot + 1) for one in went]
    arrays = [array for array in (buffer.latents, buffer.text) if array is not None]
    return all(all_finite(array[span]) for array in arrays for span in spans)

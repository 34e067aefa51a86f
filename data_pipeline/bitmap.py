"""A bit for every sample of a manifest, as a file: those that are kept (`views`), or those that are taken down (`taken`).

Little endian, mapped into memory; what is read at a start is 8 bytes a shard:

    header   8s magic "ECDITBIT" | u32 version | u32 crc32 of the rest of the header, the reason and both columns
             | 32s sha256 of the manifest | 32s sha256 of the bits | u64 samples | u64 bits that are 1 | u64 shards S
             | u32 kind: 1 keep, 2 take-down | u32 bytes of the reason
    reason   UTF-8, padded to 8 bytes
    counts u32 (S,) | crc32 u32 (S,), each padded to 8 bytes: of each shard the bits that are 1, and the sum of its words
    bits     each shard's from a whole word of 8 bytes on; sample k is bit k % 8 of byte k // 8

A shard's words are held against its sum when they are first looked at.
"""

from __future__ import annotations

import hashlib
import mmap
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Literal

import numpy as np

from data_pipeline.commit import commit, temporary_sibling
from data_pipeline.errors import BadSplit, CorruptShard, MissingShard, TruncatedShard, WrongView
from data_pipeline.manifest import View

Kind = Literal["keep", "takedown"]
MAGIC = b"ECDITBIT"
VERSION = 1
_KINDS: tuple[Kind, ...] = ("keep", "takedown")
_HEADER = struct.Struct("<8sII32s32sQQQII")
_WORD = 64
_BLOCK_WORDS = 1 << 17


@dataclass(frozen=True, kw_only=True, eq=False)
class Bitmap:
    """An open file. Raises CorruptShard from any look at bits that are not those that were written."""

    path: Path
    kind: Kind
    manifest_sha256: str
    bits_sha256: str
    """Names the samples; a file of the same ones with another reason has the same."""
    reason: str
    sizes: np.ndarray
    """int64 (S,) samples per shard"""
    counts: np.ndarray
    """uint32 (S,) bits that are 1"""
    crc: np.ndarray
    """uint32 (S,)"""
    words: np.ndarray
    """uint64, all shards end to end"""

    @cached_property
    def num_set(self) -> int:
        return int(self.counts.sum(dtype=np.int64))

    @cached_property
    def _first(self) -> np.ndarray:
        """int64 (S + 1,) first word of each shard"""
        return first_words(self.sizes)

    @cached_property
    def _checked(self) -> np.ndarray:
        return np.zeros(len(self.sizes), bool)

    def of(self, shard: int) -> np.ndarray:
        """uint64 words of one shard."""
        words = self.words[self._first[shard] : self._first[shard + 1]]
        if not self._checked[shard]:
            if zlib.crc32(words.data) != int(self.crc[shard]):
                raise CorruptShard(
                    f"{self.path}: the bits of shard number {shard} were changed (crc32 differs); copy it anew"
                )
            self._checked[shard] = True
        return words

    def test(self, shard: np.ndarray, *, sample: np.ndarray) -> np.ndarray:
        """bool (K,): whether a sample's bit is 1."""
        found = np.zeros(len(shard), bool)
        some = np.flatnonzero(self.counts[shard])
        if len(some):
            for number in np.unique(shard[some]):
                self.of(int(number))
            at, k = self._first[shard[some]], sample[some]
            word = self.words[at + k // _WORD]
            found[some] = (word >> (k % _WORD).astype(np.uint64)) & np.uint64(1) != 0
        return found

    def check(self) -> None:
        """Look at every bit. Raises CorruptShard."""
        for number in range(len(self.sizes)):
            self.of(number)


def first_words(sizes: np.ndarray) -> np.ndarray:
    """int64 (S + 1,) number of the first word of each shard, and of all."""
    return np.concatenate([[0], np.cumsum(-(-sizes // _WORD))])


def samples_of(words: np.ndarray) -> np.ndarray:
    """int32 (K,) numbers of the bits that are 1, ascending."""
    return np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).astype(np.int32)


def counts_of(bitmaps: Sequence[Bitmap], *, op: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
    """int64 (S,) bits that are 1 in each shard where bitmaps of one manifest are joined: `np.bitwise_and` or `np.bitwise_or`."""
    if len(bitmaps) == 1:
        return bitmaps[0].counts.astype(np.int64)
    first = first_words(bitmaps[0].sizes)
    before = np.zeros(len(first), np.int64)  # bits in all words before a shard's
    total, edge = 0, 0
    for start in range(0, int(first[-1]), _BLOCK_WORDS):
        stop = min(start + _BLOCK_WORDS, int(first[-1]))
        joined = bitmaps[0].words[start:stop]
        for other in bitmaps[1:]:
            joined = op(joined, other.words[start:stop])
        run = total + np.concatenate([[0], np.cumsum(np.bitwise_count(joined), dtype=np.int64)])
        last = int(np.searchsorted(first, stop, side="right"))
        before[edge:last] = run[first[edge:last] - start]
        total, edge = int(run[-1]), last
    before[edge:] = total
    return np.diff(before)


def write_bitmap(path: Path, *, kind: Kind, view: View, masks: np.ndarray | Iterable[np.ndarray], reason: str) -> None:
    """Write by rename.

    Args:
        masks: bool, over all samples in the manifest's order; or of one shard after the other.

    Raises:
        BadSplit: not a bit for every sample.
    """
    sizes, told = view.shard_sizes, reason.encode()
    counts, crcs = np.zeros(len(sizes), "<u4"), np.zeros(len(sizes), "<u4")
    middle = _padded(told), len(_padded(counts.tobytes()))
    digest, part = hashlib.sha256(), temporary_sibling(path)
    try:
        with part.open("wb") as file:
            file.write(bytes(_HEADER.size + len(middle[0]) + 2 * middle[1]))
            for shard, words in enumerate(_packed(masks, sizes=sizes)):
                counts[shard], crcs[shard] = int(np.bitwise_count(words).sum(dtype=np.int64)), zlib.crc32(words.data)
                digest.update(words.data)
                file.write(words.data)
            checked = middle[0] + _padded(counts.tobytes()) + _padded(crcs.tobytes())
            file.seek(0)
            file.write(
                _header(view, kind=kind, counts=counts, told=told, bits=digest.digest(), checked=checked) + checked
            )
        commit(part, path)
    except OSError as error:
        raise MissingShard(f"{path} cannot be written: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)


def open_bitmap(path: Path | str, *, kind: Kind, view: View) -> Bitmap:
    """Map a file.

    Raises:
        MissingShard: no such file.
        TruncatedShard, CorruptShard: cut, changed, no such file of ours.
        WrongView: of the other kind, or made for another manifest.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            raw = _mapped(file, path=path)
    except OSError as error:
        raise MissingShard(
            f"{path}: {error.strerror}; `ecdit data keep` and `ecdit data takedown` write such files"
        ) from error
    magic, version, crc, manifest, bits, total, num_set, shards, number, told = _HEADER.unpack_from(raw)
    if magic != MAGIC or version != VERSION:
        raise CorruptShard(f"{path}: not a list of samples of this version ({VERSION})")
    told_at = _HEADER.size
    counts_at = told_at + _up(told)
    crc_at, bits_at = counts_at + _up(4 * shards), counts_at + 2 * _up(4 * shards)
    if len(raw) < bits_at or zlib.crc32(raw[told_at:bits_at], zlib.crc32(raw[: _HEADER.size][16:])) != crc:
        raise CorruptShard(f"{path}: cut or changed (checksum differs); copy it anew")
    there = _KINDS[number - 1] if 1 <= number <= len(_KINDS) else "unknown"
    if there != kind:
        key = {"keep": "data.keep", "takedown": "data.take_down"}.get(there, "nothing")
        raise WrongView(f"{path}: is a list of kind {there!r}, asked for {kind!r}; it belongs to {key}")
    if manifest.hex() != view.sha256 or (shards, total) != (len(view.shards), view.num_samples):
        raise WrongView(
            f"{path}: names samples of the manifest {manifest.hex()[:12]}; {view.folder} is {view.sha256[:12]}: write it anew for "
            f"this one, or go on with the manifest that it was made for (data.manifest={manifest.hex()[:12]})"
        )
    end = bits_at + 8 * int(first_words(view.shard_sizes)[-1])
    if len(raw) != end:
        raise (TruncatedShard if len(raw) < end else CorruptShard)(f"{path}: {len(raw)} bytes, must have {end}")
    memory = memoryview(raw)
    made = Bitmap(
        path=path, kind=kind, manifest_sha256=manifest.hex(), bits_sha256=bits.hex(),
        reason=bytes(raw[told_at : told_at + told]).decode(errors="replace"), sizes=view.shard_sizes,
        counts=np.frombuffer(memory, "<u4", count=shards, offset=counts_at),
        crc=np.frombuffer(memory, "<u4", count=shards, offset=crc_at),
        words=np.frombuffer(memory, "<u8", offset=bits_at) if end > bits_at else np.zeros(0, "<u8"),
    )  # fmt: skip
    if made.num_set != num_set:
        raise CorruptShard(f"{path}: counts of its shards do not add up to {num_set}")
    return made


def _mapped(file: IO[bytes], *, path: Path) -> mmap.mmap:
    if file.seek(0, 2) < _HEADER.size:
        raise TruncatedShard(f"{path}: too short for a list of samples")
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _packed(masks: np.ndarray | Iterable[np.ndarray], *, sizes: np.ndarray) -> Iterator[np.ndarray]:
    """uint64 words of each shard."""
    total = int(sizes.sum())
    if isinstance(masks, np.ndarray):
        if masks.shape != (total,) or masks.dtype != bool:
            raise BadSplit(
                f"mask of {masks.shape} {masks.dtype}: must be bool ({total},), one for each sample of the data set"
            )
        masks = np.split(masks, np.cumsum(sizes)[:-1])
    shard = -1
    for shard, mask in enumerate(masks):
        if shard >= len(sizes) or mask.shape != (sizes[shard],) or mask.dtype != bool:
            have = f"{sizes[shard]} samples" if shard < len(sizes) else "not there"
            raise BadSplit(f"mask of shard number {shard}: {mask.shape} {mask.dtype}; the shard is {have}")
        bits = np.packbits(mask, bitorder="little")
        yield np.frombuffer(_padded(bits.tobytes()), "<u8")
    if shard + 1 != len(sizes):
        raise BadSplit(f"masks of {shard + 1} shards: the data set has {len(sizes)}")


def _header(view: View, *, kind: Kind, counts: np.ndarray, told: bytes, bits: bytes, checked: bytes) -> bytes:
    numbers = view.num_samples, int(counts.sum(dtype=np.int64)), len(counts), _KINDS.index(kind) + 1, len(told)
    rest = bytes.fromhex(view.sha256), bits, *numbers
    blank = _HEADER.pack(MAGIC, VERSION, 0, *rest)
    return _HEADER.pack(MAGIC, VERSION, zlib.crc32(checked, zlib.crc32(blank[16:])), *rest)


def _up(size: int) -> int:
    return -(-size // 8) * 8


def _padded(content: bytes) -> bytes:
    return content + bytes(_up(len(content)) - len(content))

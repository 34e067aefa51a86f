"""The `.idx` side-file: where every sample of a tar lies, in fixed records that can be mapped into memory.

Little endian:

    header  8s magic "ECDITIDX" | u32 version | u32 fields F | u64 samples n | u64 tar bytes | 32s tar sha256
            | u32 bytes of names | u32 crc32 of all that follows | names, joined by newlines, padded to 8 bytes
    records n + 1 times: u32 off512 | u32 length x F | u32 crc32

`off512 * 512` is the first header block of a sample, so 4 bytes reach 2 TiB. The sample ends where the next begins;
the record n is a sentinel that holds the end of the last one. `length` is the field's bytes or ABSENT. The checksum
is zlib's crc32 (at hand everywhere, about as fast as crc32c from Python) over the *whole* range, headers and padding
included: one call, and a flipped bit in a key is found as well. 12-20 bytes per sample for one to three fields.
"""

from __future__ import annotations

import hashlib
import mmap
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.commit import write_committed
from data_pipeline.errors import BadMember, CorruptShard, MissingShard, TruncatedShard
from data_pipeline.tar import BLOCK, Member, has_end_marker, split_name, walk

MAGIC = b"ECDITIDX"
VERSION = 1
ABSENT = 0xFFFFFFFF
_HEADER = struct.Struct("<8sIIQQ32sII")


@dataclass(frozen=True, kw_only=True)
class Index:
    """Content of one `.idx`. Arrays are read-only views of the file's bytes when loaded.

    `offset` uint32 (n + 1,) in 512-byte blocks; `length` uint32 (n, F) in bytes; `crc` uint32 (n,).
    """

    fields: tuple[str, ...]
    tar_bytes: int
    tar_sha256: str
    offset: np.ndarray
    length: np.ndarray
    crc: np.ndarray

    def __len__(self) -> int:
        return len(self.crc)

    def span(self, sample: int) -> tuple[int, int]:
        """(first byte, number of bytes) of a sample in the tar."""
        start = int(self.offset[sample]) * BLOCK
        return start, int(self.offset[sample + 1]) * BLOCK - start


def index_path(tar: Path) -> Path:
    """`x.tar` -> `x.idx`."""
    return tar.with_suffix(".idx")


def index_bytes(num_samples: int, *, fields: tuple[str, ...]) -> int:
    """Size that a whole `.idx` must have: lets a start-up check find a cut one without reading it."""
    return _HEADER.size + len(_names(fields)) + 4 * (len(fields) + 2) * (num_samples + 1)


def build_index(tar: Path) -> Index:
    """Scan a tar, ours or a foreign WebDataset one. Samples are consecutive members with one key.

    Raises:
        MissingShard: no such file.
        TruncatedShard: the tar is cut; its `num_whole` says how many samples are complete.
        CorruptShard: a damaged header.
        BadMember: refused suffix or name, a field given twice, or the members of a key not side by side.
    """
    try:
        with tar.open("rb") as file:
            if tar.stat().st_size == 0:
                raise TruncatedShard(f"shard {tar.name}: empty file, 0 whole samples")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
                return _scan(buffer, shard=tar.name)
    except OSError as error:
        raise MissingShard(f"shard {tar.name} in {tar.parent}: {error.strerror}") from error


def write_index(index: Index, path: Path) -> None:
    """Write by rename: a reader sees the whole file or none."""
    records = np.full((len(index) + 1, len(index.fields) + 2), ABSENT, dtype="<u4")
    records[:, 0] = index.offset
    records[:-1, 1:-1] = index.length
    records[:-1, -1] = index.crc
    names = _names(index.fields)
    body = names + records.tobytes()
    header = _HEADER.pack(
        MAGIC, VERSION, len(index.fields), len(index), index.tar_bytes,
        bytes.fromhex(index.tar_sha256), len(names), zlib.crc32(body),
    )  # fmt: skip
    write_committed(header + body, path)


def load_index(path: Path) -> Index:
    """Read an `.idx`: tens of kilobytes per thousand samples. (A map would hold a second descriptor per open shard.)

    Raises:
        MissingShard: no such file.
        CorruptShard: not an index, cut, or its own checksum is wrong.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise MissingShard(f"index {path.name} in {path.parent}: {error.strerror}; run `ecdit data index`") from error
    if len(raw) < _HEADER.size or raw[:8] != MAGIC:
        raise CorruptShard(f"index {path}: not an ecdit index")
    _, version, num_fields, n, tar_bytes, sha, names_bytes, crc = _HEADER.unpack_from(raw)
    if version != VERSION:
        raise CorruptShard(f"index {path}: version {version}, this program reads {VERSION}")
    body = memoryview(raw)[_HEADER.size :]
    if len(body) != names_bytes + 4 * (num_fields + 2) * (n + 1) or zlib.crc32(body) != crc:
        raise CorruptShard(f"index {path}: cut or changed (checksum differs); run `ecdit data index`")
    fields = tuple(bytes(body[:names_bytes]).rstrip(b"\0").decode().split("\n")) if num_fields else ()
    records = np.frombuffer(body[names_bytes:], "<u4").reshape(n + 1, num_fields + 2)
    return Index(
        fields=fields, tar_bytes=tar_bytes, tar_sha256=sha.hex(),
        offset=records[:, 0], length=records[:-1, 1:-1], crc=records[:-1, -1],
    )  # fmt: skip


def _scan(buffer: mmap.mmap, *, shard: str) -> Index:
    keys: dict[str, int] = {}
    starts: list[int] = []
    lengths: list[dict[str, int]] = []
    end, cut = 0, None
    members = walk(buffer, shard=shard)
    while True:
        try:
            member = next(members, None)
        except TruncatedShard as error:
            cut = error
            break
        if member is None:
            break
        _take(member, shard=shard, keys=keys, starts=starts, lengths=lengths)
        end = member.end
    if cut is None and not has_end_marker(buffer, at=end):
        # Cut exactly between two members: only the absent end-of-archive block betrays it.
        cut = TruncatedShard(f"shard {shard}: ends at byte {len(buffer)} without an end-of-archive block")
    if cut is not None:
        # The last sample counts as whole only if it has every field of the first, and a lone one does not: with
        # nothing to compare it with, it may have lost its caption.
        whole = len(lengths) if len(lengths) > 1 and set(lengths[-1]) == set(lengths[0]) else max(0, len(lengths) - 1)
        raise TruncatedShard(f"{cut}; {whole} whole samples before the cut", num_whole=whole)

    fields = tuple(dict.fromkeys(name for sample in lengths for name in sample))
    bounds = np.array([*starts, end], dtype=np.int64) // BLOCK
    if bounds[-1] > ABSENT:
        raise BadMember(f"shard {shard}: larger than 2 TiB")
    shape = (len(lengths), len(fields))
    with memoryview(buffer) as view:
        crcs = [zlib.crc32(view[a:b]) for a, b in zip(starts, [*starts, end][1:], strict=True)]
        sha = hashlib.sha256(view).hexdigest()
    return Index(
        fields=fields, tar_bytes=len(buffer), tar_sha256=sha,
        offset=bounds.astype(np.uint32),
        length=np.array([[s.get(f, ABSENT) for f in fields] for s in lengths], np.uint32).reshape(shape),
        crc=np.array(crcs, np.uint32),
    )  # fmt: skip


def _take(
    member: Member, *, shard: str, keys: dict[str, int], starts: list[int], lengths: list[dict[str, int]]
) -> None:
    """Add a member to the last sample or begin a new one."""
    key, field = split_name(member.name, shard=shard)
    sample = keys.get(key)
    if sample is None:
        keys[key] = len(starts)
        starts.append(member.start)
        lengths.append({})
    elif sample != len(starts) - 1:
        # Readers that group as they go would make two half samples of this one without a word.
        raise BadMember(f"shard {shard}: key {key!r} appears again; the members of a sample must be side by side")
    if field in lengths[-1]:
        raise BadMember(f"shard {shard}: key {key!r} has field {field!r} twice")
    lengths[-1][field] = member.size


def _names(fields: tuple[str, ...]) -> bytes:
    names = "\n".join(fields).encode()
    return names + bytes(-len(names) % 8)

"""The `.idx` side-file: where every sample of a tar lies, in fixed records that can be mapped into memory.

Little endian:

    header  8s magic "ECDITIDX" | u32 version | u32 fields F | u64 samples n | u64 tar bytes | 32s tar sha256
            | u32 bytes of names | u32 crc32 of all that follows | names, joined by newlines, padded to 8 bytes
    version 1, samples side by side
    records n + 1 times: u32 off512 | u32 length x F | u32 crc32
    version 2, something between them that is no sample
    records n times: u32 off512 | u32 end512 | u32 length x F | u32 crc32

`off512 * 512` is the first header block of a sample, so 4 bytes reach 2 TiB. In version 1 the sample ends where the
next begins; record n is a sentinel that holds the end of the last one. `length` is the field's bytes or ABSENT. The
checksum is zlib's crc32 (at hand everywhere, about as fast as crc32c from Python) over the *whole* range, headers and
padding included: one call, and a flipped bit in a key is found as well. 12-20 bytes per sample for one to three fields,
4 more in version 2.
"""

from __future__ import annotations

import hashlib
import mmap
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.commit import write_committed
from data_pipeline.errors import BadMember, CorruptShard, MissingShard, TruncatedShard, why
from data_pipeline.gather import Gathered, Sample, gather
from data_pipeline.promises import check_promises
from data_pipeline.tar import BLOCK

MAGIC = b"ECDITIDX"
VERSIONS = (1, 2)
ABSENT = 0xFFFFFFFF
COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip -c"),
    b"\x28\xb5\x2f\xfd": ("zstd", "zstd -dc"),
    b"BZh": ("bzip2", "bunzip2 -c"),
    b"\xfd7zXZ\x00": ("xz", "unxz -c"),
}
"""First bytes -> (name, the command that writes it unpacked)."""
_HEADER = struct.Struct("<8sIIQQ32sII")


@dataclass(frozen=True, kw_only=True)
class Index:
    """Content of one `.idx`. Arrays are read-only views of the file's bytes when loaded.

    `start` and `end` (n,) in 512-byte blocks; `length` uint32 (n, F) in bytes; `crc` uint32 (n,).
    """

    fields: tuple[str, ...]
    tar_bytes: int
    tar_sha256: str
    start: np.ndarray
    end: np.ndarray
    length: np.ndarray
    crc: np.ndarray

    def __len__(self) -> int:
        return len(self.crc)

    def span(self, sample: int) -> tuple[int, int]:
        """(first byte, number of bytes) of a sample in the tar."""
        start, end = int(self.start[sample]) * BLOCK, int(self.end[sample]) * BLOCK
        return start, end - start

    def bytes_of(self, sample: int, field: str) -> int:
        """Of a sample's field; ABSENT where it has none."""
        return int(self.length[sample, self.fields.index(field)]) if field in self.fields else ABSENT

    @property
    def is_dense(self) -> bool:
        """Whether the samples lie side by side (version 1)."""
        return bool((self.start[1:] == self.end[:-1]).all())


def index_path(tar: Path) -> Path:
    """`x.tar` -> `x.idx`."""
    return tar.with_suffix(".idx")


def index_bytes(num_samples: int, *, fields: tuple[str, ...]) -> tuple[int, int]:
    """Sizes that a whole `.idx` can have, by version: lets a start-up check find a cut one without reading it."""
    first = _HEADER.size + len(_names(fields))
    return first + 4 * (len(fields) + 2) * (num_samples + 1), first + 4 * (len(fields) + 3) * num_samples


@dataclass(frozen=True, kw_only=True)
class Scanned:
    """What a pass over a tar has found: its index, and all that is not in it."""

    index: Index
    found: Gathered


def scan(tar: Path, *, promises: bool = True) -> Scanned:
    """Read a tar, ours or a foreign WebDataset one, damaged or not; only whole samples are in the index.

    Args:
        promises: hold it against what its writer left beside and in it (`promises`).

    Raises:
        MissingShard: no such file.
        TruncatedShard: it is empty.
        CorruptShard: it is compressed.
        BadMember: larger than 2 TiB.
    """
    try:
        with tar.open("rb") as file:
            if tar.stat().st_size == 0:
                raise TruncatedShard(f"shard {tar.name}: empty file, 0 whole samples")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
                _refuse_compressed(buffer, shard=tar.name)
                found = gather(buffer)
                if promises:
                    check_promises(tar, found=found, buffer=buffer)
                return Scanned(index=_index_of(buffer, found.samples), found=found)
    except OSError as error:
        raise MissingShard(f"shard {tar.name} in {tar.parent}: {why(error)}") from error


def refuse_damage(tar: Path, found: Gathered) -> None:
    """Raises TruncatedShard or CorruptShard where a tar is damaged, with the number of its whole samples."""
    if not found.damage:
        return
    whole = len(found.samples)
    more = f" (and {len(found.damage) - 1} more places)" if len(found.damage) > 1 else ""
    words = f"shard {tar.name}: {found.damage[0].words}{more}; {whole} whole samples"
    if found.damage[0].kind == "cut":
        raise TruncatedShard(f"{words} before the cut", num_whole=whole)
    raise CorruptShard(words)


def build_index(tar: Path) -> Index:
    """`scan` of a tar that is not damaged. Raises what `scan` and `refuse_damage` raise."""
    scanned = scan(tar)
    refuse_damage(tar, scanned.found)
    return scanned.index


def write_index(index: Index, path: Path) -> None:
    """Write by rename: a reader sees the whole file or none."""
    n, dense = len(index), index.is_dense
    records = np.full((n + dense, len(index.fields) + 3 - dense), ABSENT, dtype="<u4")
    records[:n, 0] = index.start
    if dense:
        records[n, 0] = index.end[-1] if n else 0
    else:
        records[:, 1] = index.end
    records[:n, 2 - dense : -1] = index.length
    records[:n, -1] = index.crc
    names = _names(index.fields)
    body = names + records.tobytes()
    header = _HEADER.pack(
        MAGIC, 1 if dense else 2, len(index.fields), n, index.tar_bytes,
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
        rule = "; run `ecdit data index`" if isinstance(error, FileNotFoundError) else ""
        raise MissingShard(f"index {path.name} in {path.parent}: {why(error)}{rule}") from error
    return parse_index(raw, path=str(path))


def parse_index(raw: bytes, *, path: str) -> Index:
    """An index from its bytes; `path` is for messages. Raises CorruptShard."""
    if len(raw) < _HEADER.size or raw[:8] != MAGIC:
        raise CorruptShard(f"index {path}: not an ecdit index")
    _, version, num_fields, n, tar_bytes, sha, names_bytes, crc = _HEADER.unpack_from(raw)
    if version not in VERSIONS:
        raise CorruptShard(f"index {path}: version {version}, this program reads {' and '.join(map(str, VERSIONS))}")
    body, dense = memoryview(raw)[_HEADER.size :], version == 1
    rows, columns = n + dense, num_fields + 3 - dense
    if len(body) != names_bytes + 4 * rows * columns or zlib.crc32(body) != crc:
        raise CorruptShard(f"index {path}: cut or changed (checksum differs); run `ecdit data index`")
    fields = tuple(bytes(body[:names_bytes]).rstrip(b"\0").decode().split("\n")) if num_fields else ()
    records = np.frombuffer(body[names_bytes:], "<u4").reshape(rows, columns)
    return Index(
        fields=fields, tar_bytes=tar_bytes, tar_sha256=sha.hex(),
        start=records[:n, 0], end=records[1:, 0] if dense else records[:, 1],
        length=records[:n, 2 - dense : -1], crc=records[:n, -1],
    )  # fmt: skip


def _refuse_compressed(buffer: mmap.mmap, *, shard: str) -> None:
    head = bytes(buffer[:6])
    for magic, (what, command) in COMPRESSED.items():
        if head.startswith(magic):
            rule = f"samples of a compressed tar cannot be read where they lie; unpack it: {command} {shard} > plain/{shard}"
            raise CorruptShard(f"shard {shard}: is {what}-compressed; {rule}")


def _index_of(buffer: mmap.mmap, samples: Sequence[Sample]) -> Index:
    fields = tuple(dict.fromkeys(name for sample in samples for name in sample.fields))
    starts, ends = ([getattr(sample, edge) for sample in samples] for edge in ("start", "end"))
    if max(ends, default=0) // BLOCK > ABSENT:
        raise BadMember("larger than 2 TiB")
    with memoryview(buffer) as view:
        crcs = [zlib.crc32(view[a:b]) for a, b in zip(starts, ends, strict=True)]
        sha = hashlib.sha256(view).hexdigest()
    lengths = [[s.fields[f].size if f in s.fields else ABSENT for f in fields] for s in samples]
    return Index(
        fields=fields, tar_bytes=len(buffer), tar_sha256=sha,
        start=np.array(starts, np.int64) // BLOCK, end=np.array(ends, np.int64) // BLOCK,
        length=np.array(lengths, np.uint32).reshape(len(samples), len(fields)),
        crc=np.array(crcs, np.uint32),
    )  # fmt: skip


def _names(fields: tuple[str, ...]) -> bytes:
    names = "\n".join(fields).encode()
    return names + bytes(-len(names) % 8)

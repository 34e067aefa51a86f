"""From (shard, sample) to bytes: one `pread` of the sample's range, its checksum, then its fields."""

from __future__ import annotations

import os
import resource
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from data_pipeline.catalogue import Shards
from data_pipeline.errors import CorruptShard, MissingShard, TruncatedShard, Where
from data_pipeline.index import Index
from data_pipeline.tar import split_proven_name, walk_proven

T = TypeVar("T")

_RETRIES = 4
_BACKOFF_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class RawSample:
    """Bytes of one sample. The views share one buffer, which lives as long as any of them."""

    key: str
    fields: dict[str, memoryview]
    num_bytes: int


class _File:
    """A file descriptor; closed when the last reader lets go of it, so eviction needs no lock."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        os.close(self.fd)


@dataclass(frozen=True, kw_only=True)
class Held:
    """How many shards a reader keeps at hand."""

    files: int
    """open file descriptors"""
    indexes: int
    """indexes in memory; about 25 KB for a thousand samples"""


def held_for(shards: int) -> Held:
    """All indexes of so many shards (`order.Order.shards_at_once`), so that none is read twice, and as many files, but at most a
    quarter of those that this process may open: opening one again is cheap."""
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    few = shards if allowed == resource.RLIM_INFINITY else min(shards, max(16, allowed // 4))
    return Held(files=few, indexes=shards)


class ShardReader:
    """Thread-safe reads from the shards of a view, of which some stay open."""

    def __init__(
        self, view: Shards, *, held: Held | None = None, pread: Callable[[int, int, int], bytes] = os.pread
    ) -> None:
        self._view, self._held, self._pread = view, held or Held(files=128, indexes=128), pread
        self._files: OrderedDict[int, _File] = OrderedDict()
        self._indexes: OrderedDict[int, Index] = OrderedDict()
        self._lock = threading.Lock()
        self.bytes_read = 0
        self.retries = 0
        self.index_reads = 0

    def read(self, shard: int, *, sample: int, position: int = -1) -> RawSample:
        """One whole sample.

        Raises:
            MissingShard: the file cannot be opened, or reading fails after all retries.
            TruncatedShard: the range ends behind the end of the file.
            CorruptShard: the crc32 of the range is not that of the index.
        """
        index, file = self._index(shard), self._file(shard)
        offset, num_bytes = index.span(sample)
        payload = self._range(file.fd, offset, num_bytes, shard=shard)
        name = self._view.shards[shard].name
        where = Where(name, f"number {sample}", position)
        if len(payload) != num_bytes:
            raise TruncatedShard(f"{where}: file ends at byte {offset + len(payload)}, needs {offset + num_bytes}")
        if zlib.crc32(payload) != int(index.crc[sample]):
            raise CorruptShard(f"{where}: crc32 of {num_bytes} bytes at {offset} differs from the index")
        # Between the members of a sample may stand others that nobody asked for.
        key, fields, whole, wanted = "", {}, memoryview(payload), index.fields
        for member in walk_proven(whole, shard=name):
            of, field = split_proven_name(member.name)
            key = key or of
            if of == key and field in wanted:
                fields[field] = whole[member.data : member.data + member.size]
        return RawSample(key=key, fields=fields, num_bytes=num_bytes)

    def close(self) -> None:
        """Drop every open file."""
        with self._lock:
            self._files.clear()
            self._indexes.clear()

    def _index(self, shard: int) -> Index:
        if (known := self._kept(self._indexes, shard)) is not None:
            return known
        index = self._view.load_index(shard)
        with self._lock:
            self.index_reads += 1
        return self._keep(self._indexes, shard, index, most=self._held.indexes)

    def _file(self, shard: int) -> _File:
        if (known := self._kept(self._files, shard)) is not None:
            return known
        try:
            file = _File(os.open(self._view.tar(shard), os.O_RDONLY))
        except OSError as error:
            name = self._view.shards[shard].name
            raise MissingShard(f"shard {name} in {self._view.folder}: {error.strerror}") from error
        return self._keep(self._files, shard, file, most=self._held.files)

    def _kept(self, held: OrderedDict[int, T], shard: int) -> T | None:
        with self._lock:
            if (found := held.get(shard)) is not None:
                held.move_to_end(shard)
            return found

    def _keep(self, held: OrderedDict[int, T], shard: int, made: T, *, most: int) -> T:
        """What is held from now on; another thread may have been first. Least recently used ones go."""
        with self._lock:
            found = held.setdefault(shard, made)
            held.move_to_end(shard)
            while len(held) > most:
                held.popitem(last=False)
        return found

    def _range(self, fd: int, offset: int, num_bytes: int, *, shard: int) -> bytes:
        """`pread` until complete; network file systems return short reads and passing errors."""
        parts: list[bytes] = []
        missing, failures = num_bytes, 0
        while missing:
            try:
                part = self._pread(fd, missing, offset + num_bytes - missing)
            except OSError as error:
                failures += 1
                if failures > _RETRIES:
                    name = self._view.shards[shard].name
                    raise MissingShard(
                        f"shard {name} in {self._view.folder}: reading failed {failures} times ({error.strerror})"
                    ) from error
                with self._lock:
                    self.retries += 1
                time.sleep(_BACKOFF_SECONDS * 2 ** (failures - 1))
                continue
            if not part:
                break
            parts.append(part)
            missing -= len(part)
        with self._lock:
            self.bytes_read += num_bytes - missing
        return parts[0] if len(parts) == 1 else b"".join(parts)

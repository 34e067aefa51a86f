"""From (shard, sample) to bytes: one `pread` of the sample's range, its checksum, then its fields."""

from __future__ import annotations

import os
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from data_pipeline.errors import CorruptShard, MissingShard, TruncatedShard, Where
from data_pipeline.index import Index
from data_pipeline.manifest import View
from data_pipeline.tar import split_proven_name, walk_proven

_RETRIES = 4
_BACKOFF_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class RawSample:
    """Bytes of one sample. The views share one buffer, which lives as long as any of them."""

    key: str
    fields: dict[str, memoryview]
    num_bytes: int


class _OpenShard:
    """A file descriptor and its index; closed when the last reader lets go of it, so eviction needs no lock."""

    def __init__(self, fd: int, index: Index) -> None:
        self.fd, self.index = fd, index

    def __del__(self) -> None:
        os.close(self.fd)


class ShardReader:
    """Thread-safe reads from the shards of a view; at most `max_open` files stay open."""

    def __init__(self, view: View, *, max_open: int = 128, pread: Callable[[int, int, int], bytes] = os.pread) -> None:
        self._view, self._max_open, self._pread = view, max_open, pread
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._lock = threading.Lock()
        self.bytes_read = 0
        self.retries = 0

    def read(self, shard: int, *, sample: int, position: int = -1) -> RawSample:
        """One whole sample.

        Raises:
            MissingShard: the file cannot be opened, or reading fails after all retries.
            TruncatedShard: the range ends behind the end of the file.
            CorruptShard: the crc32 of the range is not that of the index.
        """
        opened = self._opened(shard)
        offset, num_bytes = opened.index.span(sample)
        payload = self._range(opened.fd, offset, num_bytes, shard=shard)
        name = self._view.shards[shard].name
        where = Where(name, f"number {sample}", position)
        if len(payload) != num_bytes:
            raise TruncatedShard(f"{where}: file ends at byte {offset + len(payload)}, needs {offset + num_bytes}")
        if zlib.crc32(payload) != int(opened.index.crc[sample]):
            raise CorruptShard(f"{where}: crc32 of {num_bytes} bytes at {offset} differs from the index")
        # Between the members of a sample may stand others that nobody asked for.
        key, fields, whole, wanted = "", {}, memoryview(payload), opened.index.fields
        for member in walk_proven(whole, shard=name):
            of, field = split_proven_name(member.name)
            key = key or of
            if of == key and field in wanted:
                fields[field] = whole[member.data : member.data + member.size]
        return RawSample(key=key, fields=fields, num_bytes=num_bytes)

    def close(self) -> None:
        """Drop every open file."""
        with self._lock:
            self._open.clear()

    def _opened(self, shard: int) -> _OpenShard:
        with self._lock:
            opened = self._open.get(shard)
            if opened is not None:
                self._open.move_to_end(shard)
                return opened
        index = self._view.load_index(shard)
        try:
            opened = _OpenShard(os.open(self._view.tar(shard), os.O_RDONLY), index)
        except OSError as error:
            name = self._view.shards[shard].name
            raise MissingShard(f"shard {name} in {self._view.folder}: {error.strerror}") from error
        with self._lock:
            opened = self._open.setdefault(shard, opened)  # another thread may have been first
            while len(self._open) > self._max_open:
                self._open.popitem(last=False)
        return opened

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

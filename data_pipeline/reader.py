"""From (shard, sample) to bytes: one read of the sample's range, its checksum, then its fields."""

from __future__ import annotations

import os
import resource
import threading
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np

from data_pipeline.checksum import crc32
from data_pipeline.errors import CorruptShard, StoreTrouble, TruncatedShard, Where
from data_pipeline.index import Index
from data_pipeline.manifest import View
from data_pipeline.store.ahead import ReadAhead, Reading, Want
from data_pipeline.store.files import OpenFiles, Preadv
from data_pipeline.store.patience import Patience
from data_pipeline.store.remote import RemoteStore
from data_pipeline.tar import proven_fields

Value = memoryview | str | dict | np.ndarray
"""Bytes of a member as they lie in the tar; the others come out of a user's stages (`stages`)."""
_INDEX_THREADS = 16


@dataclass(frozen=True, slots=True)
class RawSample:
    """Bytes of one sample. The views share one buffer, which lives as long as any of them."""

    key: str
    fields: dict[str, Value]
    num_bytes: int

    @property
    def payloads(self) -> dict[str, memoryview]:
        """Of `fields` those that are bytes: all, of a sample as it was read."""
        return {name: value for name, value in self.fields.items() if isinstance(value, memoryview)}


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


@dataclass(frozen=True, kw_only=True)
class ReaderStats:
    """Since the reader was made. All but the first three are of an object store."""

    bytes_read: int
    """of samples"""
    index_reads: int
    retries: int
    trouble: Mapping[str, int] = field(default_factory=dict)
    """failed requests by kind"""
    requests: int = 0
    bytes_fetched: int = 0
    """over the network, indexes and what no sample used included"""
    hedged: int = 0
    hedges_won: int = 0
    most_held: int = 0
    """largest number of bytes under way or kept at once"""


@dataclass(frozen=True, kw_only=True)
class _Steps:
    """Samples that were told of, and the indexes that are being read for them."""

    shards: Sequence[int]
    samples: Sequence[int]
    loading: Mapping[int, Future[Index]]


class _Buffer(threading.local):
    """A thread's own bytes, reused from sample to sample."""

    content = bytearray()


class ShardReader:
    """Thread-safe reads from the shards of a view, in a folder or in an object store.

    Args:
        held: shards kept at hand.
        reading, patience: how an object store is read.
        reuse: a sample's bytes are valid until the same thread reads its next one: no memory is asked for at every sample.
        preadv: the system's; tests put trouble in its place.
    """

    def __init__(
        self, view: View, *, held: Held | None = None, reading: Reading | None = None, patience: Patience | None = None,
        reuse: bool = False, preadv: Preadv = os.preadv,
    ) -> None:  # fmt: skip
        self._view, self._held, self._reuse = view, held or Held(files=128, indexes=128), reuse
        self._indexes: OrderedDict[int, Index] = OrderedDict()
        self._lock, self._buffer = threading.Lock(), _Buffer()
        self._bytes_read = self._index_reads = 0
        self._files: OpenFiles | None = None
        self._ahead: ReadAhead | None = None
        self._store: RemoteStore | None = None
        self._told: deque[tuple[int, _Steps]] = deque()
        self._loading: dict[int, Future[Index]] = {}
        self._closed = False
        if view.base:
            self._reading = reading or Reading()
            self._store = RemoteStore(view.base, patience=patience or Patience())
            sizes = view.shard_bytes
            keeps = self._held.indexes * float(sizes.mean()) <= self._reading.budget
            self._ahead = ReadAhead(self._store, shards=self._named, reading=self._reading, keeps=keeps)
            self._pool = ThreadPoolExecutor(_INDEX_THREADS, thread_name_prefix="ecdit-index")
        else:
            self._files = OpenFiles(view.tar, most=self._held.files, preadv=preadv)

    @property
    def is_remote(self) -> bool:
        return self._store is not None

    def read(self, shard: int, *, sample: int, position: int = -1) -> RawSample:
        """One whole sample.

        Raises:
            MissingShard: the file cannot be opened, or reading fails after all retries.
            StoreTrouble, ChangedShard: the same of an object store.
            TruncatedShard: the range ends behind the end of the file.
            CorruptShard: the crc32 of the range is not that of the index.
        """
        index = self.index(shard)
        offset, num_bytes = index.span(sample)
        whole = self._space(num_bytes)
        if self._ahead is not None:
            self._ahead.read(Want(shard=shard, start=offset, length=num_bytes), into=whole)
            got = num_bytes
        else:
            assert self._files is not None
            got = self._files.read(shard, start=offset, into=whole)
        self.count(got)
        if got != num_bytes:
            where = self._where(shard, sample, position)
            raise TruncatedShard(f"{where}: file ends at byte {offset + got}, needs {offset + num_bytes}")
        if crc32(whole) != int(index.crc[sample]):
            where = self._where(shard, sample, position)
            raise CorruptShard(f"{where}: crc32 of {num_bytes} bytes at {offset} differs from the index")
        key, found = proven_fields(whole, wanted=index.fields, shard=self._view.shards[shard].name)
        fields: dict[str, Value] = {**found}
        return RawSample(key=key, fields=fields, num_bytes=num_bytes)

    def index(self, shard: int) -> Index:
        """A shard's index, read once while it is held. Raises what `View.load_index` raises."""
        with self._lock:
            if (found := self._indexes.get(shard)) is not None:
                self._indexes.move_to_end(shard)
                return found
        view = self._view
        index = view.load_index(shard) if self._store is None else view.load_index(shard, store=self._store)
        with self._lock:
            self._index_reads += 1
            found = self._indexes.setdefault(shard, index)  # another thread may have been first
            self._indexes.move_to_end(shard)
            while len(self._indexes) > self._held.indexes:
                self._indexes.popitem(last=False)
        return found

    def scatter(self, shard: int, *, start: int, into: Sequence[memoryview]) -> int:
        """`OpenFiles.scatter`: bytes of a local shard, not counted and not compared with anything."""
        assert self._files is not None
        return self._files.scatter(shard, start=start, into=into)

    def count(self, num_bytes: int) -> None:
        """Bytes of samples that were read by `scatter`."""
        with self._lock:
            self._bytes_read += num_bytes

    def ahead(self, step: int, *, shards: Sequence[int], samples: Sequence[int]) -> None:
        """These samples of a later step are read soon: their indexes are fetched, and their bytes once those are here. Steps
        come in order. Nothing happens for local files: the system reads those ahead."""
        if self._ahead is None:
            return
        for shard in set(shards) - self._indexes.keys() - self._loading.keys():
            try:
                self._loading[shard] = self._pool.submit(self.index, shard)
            except RuntimeError as error:  # the pool is shut down
                raise StoreTrouble(f"{self._view.base}: closed") from error
        loading = {shard: self._loading[shard] for shard in set(shards) & self._loading.keys()}
        self._told.append((step, _Steps(shards=shards, samples=samples, loading=loading)))
        self.plan(upto=-1)

    def plan(self, *, upto: int) -> None:
        """Fetch what was told of in `ahead`: of steps up to this one now, of later ones as far as their indexes are here. Shards of
        which the index cannot be read are passed over: `read` says so when it comes to them, and may be given a substitute."""
        while self._ahead is not None and self._told:
            step, told = self._told[0]
            if step > upto and not all(index.done() for index in told.loading.values()):
                return
            self._told.popleft()
            indexes: dict[int, Index | None] = {}
            for shard in dict.fromkeys(told.shards):
                loading = told.loading.get(shard)
                self._loading.pop(shard, None)
                try:
                    indexes[shard] = self.index(shard) if loading is None else loading.result()
                except Exception:  # a mistake of ours as well: whoever needs the index meets it
                    indexes[shard] = None
            if self._closed:
                raise StoreTrouble(f"{self._view.base}: closed")
            wants = []
            for shard, sample in zip(told.shards, told.samples, strict=True):
                if (index := indexes[shard]) is not None:
                    start, length = index.span(sample)
                    wants.append(Want(shard=shard, start=start, length=length))
            self._ahead.plan(wants)

    def forget(self) -> None:
        """What was told of is not read after all."""
        self._told.clear()
        self._loading.clear()
        if self._ahead is not None:
            self._ahead.forget()

    def stats(self) -> ReaderStats:
        local = ReaderStats(
            bytes_read=self._bytes_read,
            index_reads=self._index_reads,
            retries=self._files.retries if self._files else 0,
        )
        if self._store is None or self._ahead is None:
            return local
        counts = self._store.counts
        return replace(
            local, retries=counts.retries, requests=counts.requests,
            trouble={str(kind): count for kind, count in counts.trouble.items()},
            bytes_fetched=counts.bytes, hedged=counts.hedged, hedges_won=counts.hedges_won,
            most_held=self._ahead.most_held,
        )  # fmt: skip

    def stop(self) -> None:
        """Threads that wait for bytes of an object store get StoreTrouble instead, and so does who asks for more."""
        if self._ahead is not None:
            self._closed = True
            self._pool.shutdown(wait=False, cancel_futures=True)  # first: each would ask the store for its index
            self._ahead.close()

    def close(self) -> None:
        """Drop every open file and connection."""
        self.stop()
        if self._store is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        if self._files is not None:
            self._files.close()
        with self._lock:
            self._indexes.clear()

    def _space(self, num_bytes: int) -> memoryview:
        if not self._reuse:
            return memoryview(bytearray(num_bytes))
        if len(self._buffer.content) < num_bytes:
            self._buffer.content = bytearray(max(num_bytes + num_bytes // 4, 1 << 16))
        return memoryview(self._buffer.content)[:num_bytes]

    def _named(self, shard: int) -> tuple[str, int]:
        row = self._view.shards[shard]
        return row.name, row.bytes

    def _where(self, shard: int, sample: int, position: int) -> Where:
        return Where(self._view.shards[shard].name, f"number {sample}", position)

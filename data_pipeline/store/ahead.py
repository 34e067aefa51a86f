"""Shards of a remote store, read ahead: ranges of the samples that come next are under way while others are decoded."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from data_pipeline.errors import StoreTrouble, TruncatedShard
from data_pipeline.store.blocks import Block, Blocks
from data_pipeline.store.ranges import Range
from data_pipeline.store.remote import RemoteStore


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How much is read at once."""

    in_flight: int = 32
    """Ranges under way."""
    budget: int = 2 << 30
    """Bytes of ranges that are under way or kept."""
    block: int = 4 << 20
    """Bytes of a range where whole shards are kept, and of the largest that is put together of samples."""
    gap: int = 64 << 10
    """Bytes between two samples that are read for nothing rather than asking twice."""


@dataclass(frozen=True, kw_only=True)
class Want:
    """A sample's bytes in its shard."""

    shard: int
    start: int
    length: int


class ReadAhead:
    """Thread-safe. `keeps` says whether all shards that are read at once fit the budget: then whole aligned blocks are
    fetched, once, and kept until each sample of them has been read; else the samples alone.

    Args:
        shards: number -> (path in the store, bytes).
    """

    def __init__(
        self, store: RemoteStore, *, shards: Callable[[int], tuple[str, int]], reading: Reading, keeps: bool
    ) -> None:
        self._store, self._shards, self._reading, self._keeps = store, shards, reading, keeps
        self._blocks = Blocks(budget=reading.budget, in_flight=reading.in_flight, keep=keeps)
        self._lock = threading.Lock()
        self._of_sample: dict[Want, list[Block]] = defaultdict(list)
        """Where samples are fetched alone: those that are planned -> their blocks."""
        self._planned: Counter[Want] = Counter()
        self._closed = False

    @property
    def held(self) -> int:
        """Bytes under way and here."""
        return self._blocks.held

    @property
    def most_held(self) -> int:
        return self._blocks.most_held

    def plan(self, wants: Sequence[Want]) -> None:
        """These are read soon, in about this order."""
        self._store.refuse_fork()
        with self._lock:
            self._planned.update(wants)
            if self._keeps:
                for want in wants:
                    for start, length in self._pieces(want):
                        self._blocks.want(want.shard, start=start, length=length)
            else:
                for group in _merged(wants, gap=self._reading.gap, most=self._reading.block):
                    start = group[0].start
                    length = max(want.start + want.length for want in group) - start
                    for want in group:
                        self._of_sample[want].append(self._blocks.want(want.shard, start=start, length=length))
            self._start()

    def read(self, want: Want, *, into: memoryview) -> None:
        """Wait for a sample's bytes and copy them: `into` has its length.

        Raises:
            MissingShard, ChangedShard, StoreTrouble: what the store raised.
            TruncatedShard: the shard ends before the sample does.
        """
        self._store.refuse_fork()
        size = self._shards(want.shard)[1]
        if want.start + want.length > size:
            raise TruncatedShard(f"{self._path(want.shard)}: ends at byte {size}, needs {want.start + want.length}")
        with self._lock:
            wanted = self._planned[want] > 0
            self._planned.subtract([want])
            if self._planned[want] <= 0:
                del self._planned[want]
            pieces = self._pieces(want)
            if not self._keeps and (blocks := self._of_sample.get(want)):
                block = blocks.pop(0)
                pieces = [(block.start, block.length)]
                if not blocks:
                    del self._of_sample[want]
        # One piece after the other: who waits for one must not keep another from being dropped.
        for start, length in pieces:
            with self._lock:
                if self._closed:
                    raise StoreTrouble(f"{self._store.name}: closed")
                block = self._blocks.demand(want.shard, start=start, length=length)
                self._start()
            first, last = max(start, want.start), min(start + length, want.start + want.length)
            try:
                content = block.content.result()
                into[first - want.start : last - want.start] = memoryview(content)[first - start : last - start]
                del content
            finally:
                with self._lock:
                    self._blocks.taken(block, num_bytes=last - first, wanted=wanted)
                    self._start()

    def forget(self) -> None:
        """What was planned is not read after all."""
        with self._lock:
            self._planned.clear()
            self._of_sample.clear()
            self._blocks.forget()

    def close(self) -> None:
        """Nothing more is fetched, of indexes neither; threads that wait get StoreTrouble."""
        with self._lock:
            self._closed = True
            ending = self._blocks.end()
        self._store.close(for_good=True)
        for block in ending:
            if not block.content.done():
                block.content.set_exception(StoreTrouble(f"{self._store.name}: closed"))

    def _pieces(self, want: Want) -> list[tuple[int, int]]:
        """(start, length) of the ranges that a sample is cut out of."""
        if not self._keeps:
            return [(want.start, want.length)]
        size, block = self._shards(want.shard)[1], self._reading.block
        numbers = range(want.start // block, -(-(want.start + want.length) // block))
        return [(number * block, min(block, size - number * block)) for number in numbers]

    def _start(self) -> None:
        """Under the lock."""
        if self._closed:
            return
        for block in self._blocks.to_start():
            self._store.background.submit(self._fetch(block))

    async def _fetch(self, block: Block) -> None:
        path, size = self._shards(block.shard)
        try:
            content = await self._store.fetch(Range(path=path, start=block.start, length=block.length, size=size))
        except BaseException as error:  # whatever it is, a thread waits for it
            with self._lock:
                self._blocks.failed(block)
                self._start()
            if not block.content.done():  # `close` may have been first
                cancelled = isinstance(error, asyncio.CancelledError)
                block.content.set_exception(StoreTrouble(f"{self._store.name}: closed") if cancelled else error)
            if not isinstance(error, Exception):
                raise
            return
        with self._lock:
            self._blocks.came(block)
            block.content.set_result(content)
            del content
            self._start()

    def _path(self, shard: int) -> str:
        return self._store.url(self._shards(shard)[0])


def _merged(wants: Sequence[Want], *, gap: int, most: int) -> list[list[Want]]:
    """Neighbours in a shard that are cheaper to read together, in the order in which the first of each group is read."""
    order = {want: number for number, want in reversed(list(enumerate(wants)))}
    groups: list[list[Want]] = []
    for want in sorted(wants, key=lambda want: (want.shard, want.start)):
        last = groups[-1] if groups else None
        if last is not None and last[-1].shard == want.shard:
            end = max(one.start + one.length for one in last)
            if want.start - end <= gap and max(end, want.start + want.length) - last[0].start <= most:
                last.append(want)
                continue
        groups.append([want])
    return sorted(groups, key=lambda group: min(order[want] for want in group))

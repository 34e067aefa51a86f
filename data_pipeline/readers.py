"""The reader of a data set, or of several as one: each has a reader of its own, since each may lie in another place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from data_pipeline.catalogue import Catalogue, Shards
from data_pipeline.index import Index
from data_pipeline.manifest import View
from data_pipeline.reader import Held, RawSample, ReaderStats, ShardReader
from data_pipeline.store.ahead import Reading
from data_pipeline.store.patience import Patience


class Reader(Protocol):
    """See `reader.ShardReader`."""

    @property
    def is_remote(self) -> bool: ...
    def read(self, shard: int, *, sample: int, position: int = -1) -> RawSample: ...
    def index(self, shard: int) -> Index: ...
    def scatter(self, shard: int, *, start: int, into: Sequence[memoryview]) -> int: ...
    def count(self, num_bytes: int) -> None: ...
    def ahead(self, step: int, *, shards: Sequence[int], samples: Sequence[int]) -> None: ...
    def plan(self, *, upto: int) -> None: ...
    def forget(self) -> None: ...
    def stats(self) -> ReaderStats: ...
    def stop(self) -> None: ...
    def close(self) -> None: ...


def open_reader(
    shards: Shards, *, held: Held | None = None, reading: Reading | None = None, patience: Patience | None = None,
    reuse: bool = False,
) -> Reader:  # fmt: skip
    """The arguments are those of `ShardReader`. `reading.budget` and what is `held` are for all data sets together."""
    if isinstance(shards, Catalogue):
        return _JoinedReader(shards, held=held, reading=reading, patience=patience, reuse=reuse)
    assert isinstance(shards, View)
    return ShardReader(shards, held=held, reading=reading, patience=patience, reuse=reuse)


def divided(held: Held | None, *, views: Sequence[View]) -> list[Held | None]:
    """What each of some data sets may hold of what all may: equal shares of the files, of which sets in a store need none and small
    ones no more than they have; as many indexes as any of them can need."""
    if held is None:
        return [None] * len(views)
    parts, left = [0] * len(views), held.files
    near = sorted((number for number, view in enumerate(views) if not view.base), key=lambda n: len(views[n].shards))
    for place, number in enumerate(near):
        parts[number] = min(len(views[number].shards), left // (len(near) - place))
        left -= parts[number]
    return [
        Held(files=max(1, files), indexes=max(1, min(held.indexes, len(view.shards))))
        for files, view in zip(parts, views, strict=True)
    ]


class _JoinedReader:
    def __init__(
        self, catalogue: Catalogue, *, held: Held | None, reading: Reading | None, patience: Patience | None, reuse: bool
    ) -> None:  # fmt: skip
        self._catalogue, reading = catalogue, reading or Reading()
        far = sum(bool(view.base) for view in catalogue.views)
        share = replace(reading, budget=max(1, reading.budget // max(1, far)))
        self._readers = [
            ShardReader(view, held=part, reading=share, patience=patience, reuse=reuse)
            for view, part in zip(catalogue.views, divided(held, views=catalogue.views), strict=True)
        ]

    @property
    def is_remote(self) -> bool:
        return any(reader.is_remote for reader in self._readers)

    def read(self, shard: int, *, sample: int, position: int = -1) -> RawSample:
        source, number = self._catalogue.place(shard)
        return self._readers[source].read(number, sample=sample, position=position)

    def index(self, shard: int) -> Index:
        source, number = self._catalogue.place(shard)
        return self._readers[source].index(number)

    def scatter(self, shard: int, *, start: int, into: Sequence[memoryview]) -> int:
        source, number = self._catalogue.place(shard)
        return self._readers[source].scatter(number, start=start, into=into)

    def count(self, num_bytes: int) -> None:
        self._readers[0].count(num_bytes)  # the stats are of all together

    def ahead(self, step: int, *, shards: Sequence[int], samples: Sequence[int]) -> None:
        places = [self._catalogue.place(shard) for shard in shards]
        for source, reader in enumerate(self._readers):
            mine = [(number, sample) for (of, number), sample in zip(places, samples, strict=True) if of == source]
            reader.ahead(step, shards=[number for number, _ in mine], samples=[sample for _, sample in mine])

    def plan(self, *, upto: int) -> None:
        for reader in self._readers:
            reader.plan(upto=upto)

    def forget(self) -> None:
        for reader in self._readers:
            reader.forget()

    def stats(self) -> ReaderStats:
        all_of = [reader.stats() for reader in self._readers]
        trouble: Counter[str] = Counter()
        for one in all_of:
            trouble.update(one.trouble)
        names = (
            "bytes_read",
            "index_reads",
            "retries",
            "requests",
            "bytes_fetched",
            "hedged",
            "hedges_won",
            "most_held",
        )
        return ReaderStats(**{name: sum(getattr(one, name) for one in all_of) for name in names}, trouble=dict(trouble))

    def stop(self) -> None:
        for reader in self._readers:
            reader.stop()

    def close(self) -> None:
        for reader in self._readers:
            reader.close()

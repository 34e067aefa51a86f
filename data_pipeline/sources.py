"""What a run reads: one data set or a mixture, what is kept of each, what is taken down; its name, and its order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.bitmap import Bitmap, open_bitmap
from data_pipeline.buckets import Bucket, Buckets
from data_pipeline.catalogue import Catalogue, Shards
from data_pipeline.errors import BadSplit, WrongView
from data_pipeline.held_out import HeldOut, shared_out
from data_pipeline.manifest import View, open_view
from data_pipeline.mixture import Cycle, Mixture, Shares, shares_of
from data_pipeline.narrowed import Narrowed
from data_pipeline.order import Order, Stream, Tail, without_tail
from data_pipeline.taken import TakeDowns
from data_pipeline.views import Kept, kept, open_keep

_MAX_STATE = 480
"""Bytes that sources may take of the loader's state; more of them are told by one sum."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A data set, what is used of it, and its weight among others."""

    name: str
    view: View
    weight: float = 1.0
    keeps: tuple[Bitmap, ...] = ()

    @cached_property
    def kept(self) -> Kept | None:
        return kept(self.view, self.keeps) if self.keeps else None

    @property
    def sizes(self) -> np.ndarray:
        """int64 (S,) used samples per shard"""
        return self.view.shard_sizes if self.kept is None else self.kept.sizes

    @property
    def sha256(self) -> str:
        """Name of what is used."""
        return self.view.sha256 if self.kept is None else self.kept.sha256


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """All sources, by name in this order whatever the configuration's is."""

    sources: tuple[Source, ...]
    take_downs: TakeDowns = field(default_factory=lambda: TakeDowns(lists=()))
    buckets: tuple[Bucket, ...] = ()
    """Sizes of pictures; none: all have the loader's resolution."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "sources", tuple(sorted(self.sources, key=lambda source: source.name)))
        if len({source.name for source in self.sources}) < len(self.sources) or not self.sources:
            raise BadSplit(f"sources {[source.name for source in self.sources]}: must be some, of different names")
        if self.buckets and self.is_mixture:
            raise BadSplit("buckets are of one data set: join the sources in it, or leave one of both out")

    @classmethod
    def of(cls, data: View | DataSet) -> DataSet:
        return data if isinstance(data, DataSet) else cls(sources=(Source(name="data", view=data),))

    @property
    def is_mixture(self) -> bool:
        return len(self.sources) > 1

    @cached_property
    def view(self) -> Shards:
        """What is read from."""
        if self.is_mixture:
            return Catalogue({source.name: source.view for source in self.sources})
        return self.sources[0].view

    @cached_property
    def sha256(self) -> str:
        """Name of the data set: of all that is used, not of the weights nor of what is taken down."""
        if not self.is_mixture:
            return self.sources[0].sha256
        words = [f"{source.name}\n{source.sha256}" for source in self.sources]
        return hashlib.sha256("\n".join(["ecdit mixture", *words]).encode()).hexdigest()

    def check_members(self, asked: Sequence[tuple[str, ...]]) -> None:
        """Of each group of member names, every source must have one. Raises BadSplit: one that lacks it would
        be bad samples alone."""
        for source in self.sources:
            for names in asked:
                if names and not set(names) & set(source.view.fields):
                    have = ", ".join(source.view.fields)
                    rule = f"no shard of {source.view.folder} has {' or '.join(names)}, which the others have; there are {have}"
                    raise BadSplit(f"source {source.name!r}: {rule}")

    def shares(self, *, global_batch: int) -> Shares:
        """Raises BadSplit for weights that make none."""
        return shares_of({source.name: source.weight for source in self.sources}, global_batch=global_batch)

    def identity(self, *, global_batch: int) -> dict[str, Any]:
        """What makes the data, for the loader's state."""
        mine: dict[str, Any] = {"view_sha256": self.sha256}
        if self.is_mixture:
            shares = self.shares(global_batch=global_batch)
            named = {s.name: [s.sha256[:12], w] for s, w in zip(self.sources, shares.weights, strict=True)}
            words = json.dumps(named)
            mine["sources"] = (
                named if len(words) <= _MAX_STATE
                else {"": [len(named), hashlib.sha256(words.encode()).hexdigest()[:32]]}
            )  # fmt: skip
        return mine

    def stream(
        self, *, seed: int, global_batch: int, lanes: int | None = None, window: int = 2, held_out: int = 0,
        only_held_out: bool = False,
    ) -> Stream:  # fmt: skip
        """The order over what is used.

        Args:
            lanes: of one source; a mixture finds those of each.
            held_out: the last samples are left out; of a mixture, of each source as many as its weight says.
            only_held_out: those alone, in their own order.

        Raises BadSplit for sizes that do not divide.
        """
        if not self.is_mixture:
            source = self.sources[0]
            if self.buckets:
                return self._by_size(source, seed=seed, global_batch=global_batch, window=window, held_out=held_out)
            if only_held_out:
                return self._narrow(source, Tail(source.sizes, num_samples=held_out, global_batch=global_batch))
            sizes = without_tail(source.sizes, num_samples=held_out)
            return self._narrow(source, Order(sizes, seed=seed, global_batch=global_batch, lanes=lanes, window=window))
        if lanes is not None:
            raise BadSplit(f"lanes = {lanes}: of a mixture, lanes follow from each source; leave it out")
        shares = self.shares(global_batch=global_batch)
        parts = shared_out(held_out, weights=shares.weights, global_batch=global_batch)
        first_shards = np.cumsum([0, *(len(source.view.shards) for source in self.sources)])[:-1].tolist()
        if only_held_out:
            tails = [
                self._narrow(source, Tail(source.sizes, num_samples=part, global_batch=1))
                for source, part in zip(self.sources, parts, strict=True) if part
            ]  # fmt: skip
            shards = [first for first, part in zip(first_shards, parts, strict=True) if part]
            return HeldOut(tails, first_shards=shards, global_batch=global_batch)
        used = [without_tail(source.sizes, num_samples=part) for source, part in zip(self.sources, parts, strict=True)]
        names = [source.name for source in self.sources]
        cycle = Cycle(shares, sizes=used, names=names, seed=seed, global_batch=global_batch, window=window)
        streams = [self._narrow(source, cycle.order(i, sizes=used[i])) for i, source in enumerate(self.sources)]
        return Mixture(cycle, streams=streams, first_shards=first_shards)

    def _by_size(self, source: Source, *, seed: int, global_batch: int, window: int, held_out: int) -> Buckets:
        if held_out:
            raise BadSplit(f"held_out = {held_out}: with buckets nothing is held out; leave one of both out")
        return Buckets(
            source.view, self.buckets, seed=seed, global_batch=global_batch, window=window,
            keeps=source.keeps, taken=self.take_downs.of(source.view),
        )  # fmt: skip

    def _narrow(self, source: Source, order: Order | Tail) -> Order | Tail | Narrowed:
        taken = self.take_downs.of(source.view)
        return Narrowed(order, kept=source.kept, taken=taken) if source.kept is not None or taken else order


@dataclass(frozen=True, kw_only=True)
class SizeNamed:
    """A bucket as a configuration names it: the file of its samples, their height and width in pixels."""

    samples: str
    height: int
    width: int


@dataclass(frozen=True, kw_only=True)
class Named:
    """A source as a configuration names it: folder, weight, files of what is kept, manifest."""

    shards: str
    weight: float = 1.0
    keep: Sequence[str] = ()
    manifest: str | None = None


def open_data(
    named: Mapping[str, Named], *, take_down: Sequence[str] = (), buckets: Mapping[str, SizeNamed] | None = None,
    check_files: bool = True,
) -> DataSet:  # fmt: skip
    """Open all sources.

    Args:
        buckets: of one source, by name.
        take_down: lists of samples that are not to be delivered; each names the manifest that it was made for.
        check_files: look at the size of every tar and index, and at every bit; else another rank does.

    Raises:
        MissingShard, TruncatedShard, CorruptShard: see `manifest.open_view` and `bitmap.open_bitmap`.
        WrongView: a list made for none of these data sets.
        BadSplit: keeps that leave nothing.
    """
    sources = []
    for name, one in named.items():
        view = open_view(one.shards, which=one.manifest, check_files=check_files)
        keeps = tuple(open_keep(path, view=view) for path in one.keep)
        sources.append(Source(name=name, view=view, weight=one.weight, keeps=keeps))
    lists = tuple(_take_down(path, views=[source.view for source in sources]) for path in take_down)
    if check_files:
        for bitmap in (*lists, *(keep for source in sources for keep in source.keeps)):
            bitmap.check()
    sizes = tuple(
        Bucket(name=name, height=one.height, width=one.width, samples=open_keep(one.samples, view=sources[0].view))
        for name, one in (buckets or {}).items()
    )
    return DataSet(sources=tuple(sources), take_downs=TakeDowns(lists=lists), buckets=sizes)


def _take_down(path: str, *, views: Sequence[View]) -> Bitmap:
    last: WrongView | None = None
    for view in views:
        try:
            return open_bitmap(Path(path), kind="takedown", view=view)
        except WrongView as error:
            last = error
    assert last is not None
    raise last

"""Several data sets as one: shards are numbered through, so that readers, indexes and fillers know of no sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np

from data_pipeline.index import Index
from data_pipeline.manifest import View
from data_pipeline.table import Made, Shard


class Shards(Protocol):
    """What reading asks of a data set, be it one (`View`) or several (`Catalogue`)."""

    @property
    def folder(self) -> Path: ...
    @property
    def shards(self) -> Sequence[Shard]: ...
    @property
    def fields(self) -> tuple[str, ...]: ...
    @property
    def shard_sizes(self) -> np.ndarray: ...
    @property
    def num_samples(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def base(self) -> str: ...
    def tar(self, shard: int) -> Path: ...
    def load_index(self, shard: int) -> Index: ...


class Catalogue:
    """Data sets end to end, by name. A shard's name begins with that of its data set: `photos/shard-000017.tar`."""

    def __init__(self, views: Mapping[str, View]) -> None:
        self.names, self.views = tuple(views), tuple(views.values())
        self.first_shards = np.concatenate([[0], np.cumsum([len(view.shards) for view in self.views])])
        """int64 (sources + 1,)"""
        self.shards: Sequence[Shard] = _Joined(self)

    def place(self, shard: int) -> tuple[int, int]:
        """Data set, and the shard's number in it."""
        source = int(np.searchsorted(self.first_shards, shard, side="right")) - 1
        return source, shard - int(self.first_shards[source])

    @property
    def folder(self) -> Path:
        """For messages: all of them."""
        return Path(", ".join(f"{name}={view.folder}" for name, view in zip(self.names, self.views, strict=True)))

    @cached_property
    def fields(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for view in self.views for name in view.fields))

    @cached_property
    def shard_sizes(self) -> np.ndarray:
        """int64 (S,) over all data sets"""
        return np.concatenate([view.shard_sizes for view in self.views])

    @property
    def num_samples(self) -> int:
        return sum(view.num_samples for view in self.views)

    @property
    def num_bytes(self) -> int:
        return sum(view.num_bytes for view in self.views)

    @property
    def base(self) -> str:
        """URL of the first that does not lie in a folder."""
        return next((view.base for view in self.views if view.base), "")

    def tar(self, shard: int) -> Path:
        source, number = self.place(shard)
        return self.views[source].tar(number)

    def load_index(self, shard: int) -> Index:
        """Raises what `View.load_index` raises."""
        source, number = self.place(shard)
        return self.views[source].load_index(number)


class _Joined(Made):
    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue

    def __len__(self) -> int:
        return int(self._catalogue.first_shards[-1])

    def row(self, number: int) -> Shard:
        source, own = self._catalogue.place(number)
        row = self._catalogue.views[source].shards[own]
        return replace(row, name=f"{self._catalogue.names[source]}/{row.name}")

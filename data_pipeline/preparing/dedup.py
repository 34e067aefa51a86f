"""Which samples of a data set show what an earlier one shows: one join over the fingerprints of all shards.

Exact duplicates have equal pixels. Near ones differ in at most `distance` of 64 bits: then at least one of `distance + 1`
bands of the bits is equal, so that only pictures that share a band are compared. A cluster is what hangs together, and its
first sample in the manifest's order is kept: the answer depends on the set alone.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.commit import write_committed
from data_pipeline.errors import DataError
from data_pipeline.manifest import View
from data_pipeline.parts import Part
from data_pipeline.preparing import drive
from data_pipeline.preparing.drive import Done, Watch
from data_pipeline.preparing.fingerprints import BOTH, NONE, PrintWork
from data_pipeline.preparing.local import Runner
from data_pipeline.preparing.select import tables_of
from data_pipeline.preparing.source_tars import SetSource
from data_pipeline.preparing.work import digest, finished

MOST = 15
"""Of the distance: above, unlike pictures meet too often."""
COMPARED_AT_ONCE = 1 << 22
"""Pairs."""


@dataclass(frozen=True, kw_only=True)
class Duplicates:
    """What a data set shows twice."""

    view: View
    first: np.ndarray
    """int64 (N,), of each sample the first of its cluster; itself where it is the first"""
    exact: int
    """samples whose pixels an earlier one has"""
    near: int
    """others that are nearly an earlier one"""
    unread: int
    """samples without a picture that can be decoded; they are kept, since nothing says that they are duplicates"""

    @property
    def mask(self) -> np.ndarray:
        """bool (N,), True where a sample is kept"""
        return self.first == np.arange(len(self.first))

    def clusters(self) -> Iterator[np.ndarray]:
        """Samples (ascending) of each cluster of two and more, by their first."""
        members = np.flatnonzero(np.isin(self.first, self.first[~self.mask]))
        members = members[np.argsort(self.first[members], kind="stable")]
        edges = np.flatnonzero(np.diff(self.first[members])) + 1
        return iter(np.split(members, edges)) if len(members) else iter(())

    def lines(self) -> list[str]:
        """For people."""
        kept = int(self.mask.sum())
        return [
            f"kept         {kept:>12,} of {len(self.first):,} samples",
            f"dropped      {self.exact:>12,} samples: pixels of an earlier one",
            f"dropped      {self.near:>12,} samples: nearly an earlier one",
            *(
                [f"kept         {self.unread:>12,} of them without a picture that can be decoded"]
                if self.unread
                else []
            ),
        ]


def make_prints(
    folder: Path | str, *, tables: Path | None = None, runner: Runner | None = None, part: Part | None = None,
    watch: Watch | None = None,
) -> tuple[PrintWork, Done]:  # fmt: skip
    """The fingerprints of a data set, in `tables/prints` inside of it by default; those that are there are not made again."""
    source = SetSource(folder=Path(folder))
    work = PrintWork(source=source, folder=tables_of(folder, tables) / "prints")
    return work, drive.run(work, work.folder, runner=runner, part=part, watch=watch)


def made_prints(folder: Path | str, *, tables: Path | None = None) -> PrintWork | None:
    """The fingerprints of a data set where all of them have been made."""
    work = PrintWork(source=SetSource(folder=Path(folder)), folder=tables_of(folder, tables) / "prints")
    params_sha256 = digest(work.params)
    return work if all(finished(task, params_sha256=params_sha256) is not None for task in work.tasks()) else None


def write_clusters(found: Duplicates, out: Path) -> Path:
    """A line for each cluster, its first sample first: `[{"shard": name, "sample": number}, ...]`."""
    starts = np.cumsum([0, *found.view.shard_sizes])
    lines = []
    for cluster in found.clusters():
        shards = np.searchsorted(starts, cluster, side="right") - 1
        members = [
            {"shard": found.view.shards[shard].name, "sample": position - int(starts[shard])}
            for shard, position in zip(shards.tolist(), cluster.tolist(), strict=True)
        ]
        lines.append(json.dumps(members) + "\n")
    write_committed("".join(lines).encode(), out)
    return out


def find_duplicates(work: PrintWork, *, distance: int = 4) -> Duplicates:
    """Join the fingerprints of `make_prints`; 25 bytes a sample in memory, and as much again.

    Args:
        distance: bits in which near duplicates may differ; -1 finds exact ones only.

    Raises:
        DataError: a distance that is not -1 to `MOST`.
    """
    if not -1 <= distance <= MOST:
        raise DataError(f"distance = {distance}: must be 0 to {MOST}, or -1 for equal pixels only")
    view = work.source.view
    prints = np.concatenate([np.load(task.output, allow_pickle=False) for task in work.tasks()])
    there = np.flatnonzero(prints["state"] != NONE)
    exact = np.arange(len(prints))
    exact[there] = there[_first_of_equal(prints["sha"][there])]
    structured = np.flatnonzero((prints["state"] == BOTH) & (exact == np.arange(len(prints))))
    first = exact
    if distance >= 0 and len(structured):
        near = np.arange(len(prints))
        near[structured] = structured[_first_of_near(prints["bits"][structured], distance=distance)]
        first = near[exact]
    dropped = first != np.arange(len(prints))
    by_pixels = int((exact != np.arange(len(prints))).sum())
    return Duplicates(
        view=view, first=first, exact=by_pixels, near=int(dropped.sum()) - by_pixels,
        unread=int((prints["state"] == NONE).sum()),
    )  # fmt: skip


def _first_of_equal(values: np.ndarray) -> np.ndarray:
    """(n,) the number of the first equal value."""
    _, first, which = np.unique(values, return_index=True, return_inverse=True)
    return first[which]


def _first_of_near(bits: np.ndarray, *, distance: int) -> np.ndarray:
    """(n,) the number of the first value of its cluster. Equal values are compared once."""
    unique, first, which = np.unique(bits, return_index=True, return_inverse=True)
    pairs = [pair for low, high in _bands(distance + 1) for pair in _close(unique, low, high, distance=distance)]
    if not pairs:
        return first[which]
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    a, b = np.concatenate(pairs, axis=1)
    graph = coo_array((np.ones(len(a), bool), (a, b)), shape=(len(unique), len(unique)))
    count, cluster = connected_components(graph, directed=False)
    earliest = np.full(count, len(bits))
    np.minimum.at(earliest, cluster, first)
    return earliest[cluster][which]


def _bands(count: int) -> list[tuple[int, int]]:
    """64 bits in `count` pieces: [low, high)."""
    edges = [round(64 * n / count) for n in range(count + 1)]
    return list(itertools.pairwise(edges))


def _close(values: np.ndarray, low: int, high: int, *, distance: int) -> Iterator[np.ndarray]:
    """int64 (2, K) pairs that are equal in bits low to high and differ in at most `distance`."""
    band = (values >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)
    order = np.argsort(band, kind="stable")
    for group in np.split(order, np.flatnonzero(np.diff(band[order])) + 1):
        size = len(group)
        step = max(1, COMPARED_AT_ONCE // size)
        for begin in range(0, size if size > 1 else 0, step):
            some = group[begin : begin + step]
            apart = np.bitwise_count(values[some][:, None] ^ values[group][None, :])
            a, b = np.nonzero(apart <= distance)
            a, b = some[a], group[b]
            yield np.stack([a, b])[:, a < b]

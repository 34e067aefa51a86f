"""Samples by their keys: one pass over the headers of a data set, for lists of what is to be kept or taken down.

Of a set in an object store, the first bytes of each sample are fetched, several at a time, never a whole shard."""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from data_pipeline.errors import BadMember, MissingShard, why
from data_pipeline.index import Index
from data_pipeline.manifest import View
from data_pipeline.store.ahead import ReadAhead, Reading, Want
from data_pipeline.store.patience import Patience
from data_pipeline.store.remote import RemoteStore
from data_pipeline.tar import first_name, split_proven_name, walk_proven

T = TypeVar("T")

_THREADS = 8
_HEADERS = 2048
"""Bytes of a sample that are fetched: a header, or one behind an extended header and its name."""
_BUDGET = 64 << 20
_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Named:
    """Which samples a list names."""

    mask: np.ndarray
    """bool (N,) over all samples in the manifest's order"""
    unknown: tuple[str, ...]
    """lines of which no sample is here"""


def read_list(path: Path) -> list[str]:
    """Lines of a file: a sample's key each, or `SHARD<tab>KEY` where a key stands in several shards. Empty ones are left out.

    Raises:
        MissingShard: no such file.
        BadMember: it is empty, or no text.
    """
    try:
        lines = [line.rstrip("\r") for line in path.read_bytes().decode().split("\n") if line.strip()]
    except OSError as error:
        raise MissingShard(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BadMember(f"{path}: not a list of keys (not UTF-8 at byte {error.start})") from error
    if not lines:
        raise BadMember(f"{path}: names no key; one on each line")
    return lines


def find(view: View, lines: Sequence[str]) -> Named:
    """The samples of which the key (or shard and key) is among the lines.

    Raises:
        MissingShard, CorruptShard: a tar or an index that cannot be read.
        BadMember: not one of the lines is here.
    """
    wanted, seen = set(lines), set()
    mask = np.zeros(view.num_samples, bool)
    first = np.concatenate([[0], np.cumsum(view.shard_sizes)])
    for shard, keys in enumerate(keys_by_shard(view)):
        name = view.shards[shard].name
        for sample, key in enumerate(keys):
            found = {key, f"{name}\t{key}"} & wanted
            mask[first[shard] + sample] = bool(found)
            seen |= found
    unknown = tuple(line for line in lines if line not in seen)
    if len(unknown) == len(lines):
        raise BadMember(
            f"none of {len(lines)} keys is in {view.place}: {shown(unknown)}; a sample there is called {_one(view)!r}"
        )
    return Named(mask=mask, unknown=unknown)


def keys_by_shard(view: View, *, shards: Sequence[int] | None = None) -> Iterator[list[str]]:
    """Of some shards (of all) in order, the keys of their samples; few shards are read ahead of the one that is asked for.

    Raises:
        MissingShard, CorruptShard: a tar or an index that cannot be read.
        StoreTrouble, ChangedShard: the same of an object store.
    """
    numbers = range(len(view.shards)) if shards is None else shards
    return _far(view, numbers) if view.base else _near(view, numbers)


def _near(view: View, shards: Sequence[int]) -> Iterator[list[str]]:
    return _in_order(lambda shard: list(_keys_of(view, shard)), shards)


def _far(view: View, shards: Sequence[int]) -> Iterator[list[str]]:
    store, rows = RemoteStore(view.base, patience=Patience()), view.shards
    reading = Reading(budget=_BUDGET)
    ahead = ReadAhead(
        store, shards=lambda number: (rows[number].name, rows[number].bytes), reading=reading, keeps=False
    )
    planned: deque[tuple[int, Index]] = deque()
    try:
        for shard, index in _in_order(lambda number: (number, view.load_index(number, store=store)), shards):
            ahead.plan([_begin(shard, index, sample) for sample in range(len(index))])
            planned.append((shard, index))
            if len(planned) > 1:
                yield _fetched(ahead, view, *planned.popleft())
        while planned:
            yield _fetched(ahead, view, *planned.popleft())
    finally:
        ahead.close()


def _in_order(work: Callable[[int], T], numbers: Sequence[int]) -> Iterator[T]:
    """What threads make of the numbers, few of them ahead of the one that is asked for."""
    with ThreadPoolExecutor(_THREADS) as pool:
        under_way: deque[Future[T]] = deque()
        try:
            for number in numbers:
                under_way.append(pool.submit(work, number))
                if len(under_way) > 2 * _THREADS:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            for one in under_way:
                one.cancel()


def _begin(shard: int, index: Index, sample: int) -> Want:
    start, size = index.span(sample)
    return Want(shard=shard, start=start, length=min(size, _HEADERS))


def _fetched(ahead: ReadAhead, view: View, shard: int, index: Index) -> list[str]:
    keys = []
    for sample in range(len(index)):
        want = _begin(shard, index, sample)
        begin = memoryview(bytearray(want.length))
        ahead.read(want, into=begin)
        if (member := first_name(begin)) is None:  # a name that is longer than what was fetched
            begin = memoryview(bytearray(index.span(sample)[1]))
            ahead.read(Want(shard=shard, start=want.start, length=len(begin)), into=begin)
            member = next(walk_proven(begin, shard=view.shards[shard].name)).name
        keys.append(split_proven_name(member)[0])
    return keys


def _keys_of(view: View, shard: int) -> Iterator[str]:
    """Of the samples of a shard in order; of each, its first headers are read."""
    index = view.load_index(shard)
    if not len(index):
        return
    try:
        with (
            view.tar(shard).open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as raw,
            memoryview(raw) as whole,
        ):
            for sample in range(len(index)):
                start, size = index.span(sample)
                with whole[start : start + size] as part:
                    members = walk_proven(part, shard=view.shards[shard].name)
                    yield split_proven_name(next(members).name)[0]
                    del members
    except OSError as error:
        raise MissingShard(f"shard {view.shards[shard].name} in {view.folder}: {why(error)}") from error


def shown(lines: Sequence[str]) -> str:
    """A few of them, for messages."""
    return ", ".join(map(repr, lines[:_SHOWN])) + (f" and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else "")


def _one(view: View) -> str:
    sizes = np.flatnonzero(view.shard_sizes)
    return next(keys_by_shard(view, shards=[int(sizes[0])]))[0] if len(sizes) else ""

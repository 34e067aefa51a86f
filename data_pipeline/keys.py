"""Samples by their keys: one pass over the headers of a data set, for lists of what is to be kept or taken down."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.errors import BadMember, MissingShard
from data_pipeline.manifest import View
from data_pipeline.tar import split_proven_name, walk_proven

_THREADS = 8
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
    with ThreadPoolExecutor(_THREADS) as pool:
        for shard, keys in enumerate(pool.map(lambda number: list(keys_of(view, number)), range(len(view.shards)))):
            name = view.shards[shard].name
            for sample, key in enumerate(keys):
                found = {key, f"{name}\t{key}"} & wanted
                mask[first[shard] + sample] = bool(found)
                seen |= found
    unknown = tuple(line for line in lines if line not in seen)
    if len(unknown) == len(lines):
        raise BadMember(
            f"none of {len(lines)} keys is in {view.folder}: {shown(unknown)}; a sample there is called {_one(view)!r}"
        )
    return Named(mask=mask, unknown=unknown)


def keys_of(view: View, shard: int) -> Iterator[str]:
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
                    members.close()
    except OSError as error:
        raise MissingShard(f"shard {view.shards[shard].name} in {view.folder}: {error.strerror}") from error


def shown(lines: Sequence[str]) -> str:
    """A few of them, for messages."""
    return ", ".join(map(repr, lines[:_SHOWN])) + (f" and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else "")


def _one(view: View) -> str:
    sizes = np.flatnonzero(view.shard_sizes)
    return next(keys_of(view, int(sizes[0]))) if len(sizes) else ""

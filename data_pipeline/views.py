"""Views: which samples of a data set are used. A filter or a search for duplicates writes one bit a sample (`bitmap`); a run reads
through the files that `data.keep` names, and uses what all of them keep.

What is kept is another data set: its name is made of the manifest's and of the bits', and counts are known before the
first step, so that an order over it is arithmetic as over any other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from data_pipeline.bitmap import Bitmap, counts_of, open_bitmap, samples_of, write_bitmap
from data_pipeline.errors import BadSplit
from data_pipeline.manifest import View

_REMEMBERED = 1 << 22
"""Numbers of kept samples that stay at hand (16 MB); those of a shard are found anew in microseconds."""


def write_keep(view: View, mask: np.ndarray | Iterable[np.ndarray], *, reason: str, out: Path | str) -> Bitmap:
    """Write which samples of a data set are kept.

    Args:
        mask: bool (N,) over all samples in the manifest's order; or an array for each shard, in order, for sets that are large.
        reason: for people.

    Raises:
        BadSplit: not a bit for every sample.
        MissingShard: it cannot be written.
    """
    write_bitmap(Path(out), kind="keep", view=view, masks=mask, reason=reason)
    return open_keep(out, view=view)


def open_keep(path: Path | str, *, view: View) -> Bitmap:
    """Raises what `bitmap.open_bitmap` raises."""
    return open_bitmap(path, kind="keep", view=view)


class Kept:
    """What some files keep of a data set, together.

    Raises BadSplit where that is nothing.
    """

    def __init__(self, view: View, keeps: Sequence[Bitmap]) -> None:
        unique = {keep.bits_sha256: keep for keep in keeps}
        self._keeps = [unique[sha] for sha in sorted(unique)]
        self.sizes = counts_of(self._keeps, op=np.bitwise_and)
        """int64 (S,) kept samples per shard"""
        total = int(self.sizes.sum())
        if total == 0:
            raise BadSplit(
                f"{', '.join(str(keep.path) for keep in keeps)}: together they keep no sample of {view.folder}"
            )
        words = "\n".join(["ecdit view", view.sha256, *sorted(unique)])
        self.sha256 = hashlib.sha256(words.encode()).hexdigest()
        mean = max(1, total // max(1, int((self.sizes > 0).sum())))
        self._of = lru_cache(maxsize=min(max(_REMEMBERED // mean, 64), 8192))(self._find)

    def select(self, shard: np.ndarray, *, number: np.ndarray) -> np.ndarray:
        """int64 (K,) sample in its shard of the kept one of this number there, from 0."""
        sample = np.empty(len(shard), np.int64)
        by_shard = np.argsort(shard, kind="stable")
        edges = np.flatnonzero(np.diff(shard[by_shard])) + 1
        for group in np.split(by_shard, edges) if len(shard) else ():
            sample[group] = self._of(int(shard[group[0]]))[number[group]]
        return sample

    def mask(self) -> np.ndarray:
        """bool (N,) over all samples of the data set."""
        parts = []
        for shard, size in enumerate(self._keeps[0].sizes.tolist()):
            part = np.zeros(size, bool)
            part[self._of(shard)] = True
            parts.append(part)
        return np.concatenate(parts)

    def _find(self, shard: int) -> np.ndarray:
        """int32, ascending"""
        words = self._keeps[0].of(shard)
        for keep in self._keeps[1:]:
            words = words & keep.of(shard)
        return samples_of(words)


def kept(view: View, keeps: Sequence[Bitmap | Path | str]) -> Kept:
    """What files, or opened ones, keep of a data set."""
    return Kept(view, [keep if isinstance(keep, Bitmap) else open_keep(keep, view=view) for keep in keeps])

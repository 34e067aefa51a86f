"""Which of a few picture sizes each sample of a data set is trained at: the one that is nearest to its own shape."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.errors import BadSplit
from data_pipeline.manifest import View
from data_pipeline.preparing.facts import FactsWork, rows
from data_pipeline.views import write_keep

_NO_SIZE = -1
_WIDTH = 1 << 32
"""Above any width."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """Pixels."""

    height: int
    width: int

    @property
    def name(self) -> str:
        return f"{self.height}x{self.width}"

    def apart(self, *, height: int, width: int) -> float:
        """How far a picture's aspect ratio is from this one's: the exponential of the distance of their logarithms, 1 where they
        are equal. A quotient of whole numbers, so the same on any machine."""
        a, b = self.height * width, self.width * height
        return max(a, b) / min(a, b)


def read_size(text: str) -> Size:
    """`192x320` is 192 pixels high. Raises BadSplit for anything else."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text.strip())
    if found is None:
        raise BadSplit(f"size {text!r}: must be HEIGHTxWIDTH in pixels, as 192x320")
    return Size(height=int(found[1]), width=int(found[2]))


@dataclass(frozen=True, kw_only=True)
class Sized:
    """Which size each sample of a data set has got."""

    view: View
    sizes: tuple[Size, ...]
    of_shard: tuple[np.ndarray, ...]
    """for each shard int16 (n,): which of `sizes`, or -1 where there is no picture, or none that can be read"""
    left_out: Mapping[str, int]
    """name of a size that too few samples are nearest to -> how many those are; they have got another one"""

    @property
    def counts(self) -> dict[Size, int]:
        return {size: sum(int((one == n).sum()) for one in self.of_shard) for n, size in enumerate(self.sizes)}

    @property
    def without(self) -> int:
        """Samples of no size."""
        return sum(int((one == _NO_SIZE).sum()) for one in self.of_shard)

    def write(self, folder: Path) -> dict[Size, Path]:
        """A list of samples (`views`) for each size."""
        folder.mkdir(parents=True, exist_ok=True)
        written = {size: folder / f"{size.name}.keep" for size in self.sizes}
        for n, (size, path) in enumerate(written.items()):
            write_keep(self.view, (one == n for one in self.of_shard), reason=f"nearest to {size.name}", out=path)
        return written


def nearest(sizes: Sequence[Size], *, height: int, width: int) -> int:
    """Which size a picture is trained at: of the nearest aspect ratio, the first of equally near ones; of sizes that have the
    same one, the largest that needs no enlarging, else the smallest."""
    best = min(size.apart(height=height, width=width) for size in sizes)
    shape = next(size for size in sizes if size.apart(height=height, width=width) == best)
    alike = [n for n, size in enumerate(sizes) if size.height * shape.width == size.width * shape.height]
    alike.sort(key=lambda n: -sizes[n].height)
    return next((n for n in alike if sizes[n].height <= height and sizes[n].width <= width), alike[-1])


def sort_by_size(work: FactsWork, *, sizes: Sequence[Size], least: int = 1) -> Sized:
    """Give every picture of the tables of `select.make_facts` its size; a size of fewer than `least` samples is left out,
    the smallest first, and its samples go to the nearest of the others.

    Raises BadSplit where sizes are named twice, or none is left.
    """
    if not sizes or len(set(sizes)) < len(sizes):
        raise BadSplit(f"sizes {[size.name for size in sizes]}: must be some, each once")
    view = work.source.view
    pictures = [_pictures(task.output, count) for task, count in zip(work.tasks(), view.shard_sizes, strict=True)]
    if not any(one.any() for one in pictures):
        raise BadSplit(f"{view.folder}: no sample has a picture that can be read, so there is nothing to sort by size")
    packed, which, counts = np.unique(np.concatenate(pictures), return_inverse=True, return_counts=True)
    shapes = [divmod(one, _WIDTH) for one in packed.tolist()]
    left, left_out = list(sizes), dict[str, int]()
    while True:
        chosen = np.array([nearest(left, height=h, width=w) if h else _NO_SIZE for h, w in shapes], np.int16)
        held = [int(counts[chosen == n].sum()) for n in range(len(left))]
        fewest = min(range(len(left)), key=lambda n: (held[n], -n))
        if held[fewest] >= least:
            break
        left_out[left[fewest].name] = held[fewest]
        del left[fewest]
        if not left:
            most = sum(held)
            raise BadSplit(f"least = {least}: {view.folder} has {most} pictures; must be at most that; nearest: {most}")
    per_sample = chosen[which]
    of_shard = tuple(np.split(per_sample, np.cumsum(view.shard_sizes)[:-1]))
    return Sized(view=view, sizes=tuple(left), of_shard=of_shard, left_out=left_out)


def _pictures(table: Path, count: int) -> np.ndarray:
    """int64 (n,) height * _WIDTH + width; 0 where there is no picture."""
    found = np.zeros(int(count), np.int64)
    for row in rows(table):
        if row["height"] and row["width"]:
            found[row["sample"]] = row["height"] * _WIDTH + row["width"]
    return found

"""What lies where in the rank files of format 2. Nothing of it is stored: it follows from tensors and patterns by rule.

A rank file is a safetensors file: 8 bytes of length, a JSON header filled up with spaces to a multiple of
64 bytes, then the boxes, one after the other. First come the tensors with the longest elements, so that
every element lies on a multiple of its size although safetensors allows no gaps; among equals the tensor's
name decides, then the order of boxes in its pattern. A box that is not its whole tensor carries its bounds
in its name: `model/patch_embed.weight[0:8, 0:16]`.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from ecdit_train.checkpoint.layout import DTYPES
from ecdit_train.checkpoint.pattern import Ints, Pattern, Turn
from ecdit_train.errors import CheckpointError
from ecdit_train.parallel.placement import Box

SAFETENSORS_NAME: Mapping[str, str] = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}
"""The format's names of the types that a checkpoint may hold."""

HEADER_MULTIPLE = 64
MAX_HEADER_BYTES = 100 * 10**6
"""What the safetensors library accepts."""


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """What a tensor is, globally."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor: what it is globally, and how and at whose turn it is cut and written."""

    info: TensorInfo
    pattern: Pattern
    turn: int
    """Its number, in name order, among the tensors of its pattern."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A box as it lies in a file: row-major, from byte `start` after the header."""

    name: str
    box: Box
    dtype: str
    start: int
    nbytes: int


@dataclass(kw_only=True)
class RankFiles:
    """Every rank's file, for `world` ranks. Raises nothing: entries and patterns have been checked."""

    entries: Mapping[str, Entry]
    world: int
    order: list[str] = field(init=False)
    _row: dict[str, int] = field(init=False)
    _columns: dict[int, Ints] = field(init=False, default_factory=dict)
    _boxes: dict[tuple[int, int, int], list[int]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.order = sorted(self.entries, key=lambda name: (-self.entries[name].info.itemsize, name))
        self._row = {name: n for n, name in enumerate(self.order)}

    def turn(self, name: str) -> Turn:
        entry = self.entries[name]
        return entry.pattern.turn(entry.turn)

    def prepare(self, ranks: Iterable[int]) -> None:
        """Compute the offsets of some ranks' files in one pass over the tensors, which costs less than rank by rank."""
        wanted = sorted(set(ranks) - self._columns.keys())
        if not wanted:
            return
        column = np.full(self.world, len(wanted))  # the last column takes what is not wanted
        column[wanted] = np.arange(len(wanted))
        sizes = np.zeros((len(self.order) + 1, len(wanted) + 1), dtype=np.int64)
        for row, name in enumerate(self.order, start=1):
            turn = self.turn(name)
            sizes[row, column[turn.ranks]] = turn.totals * self.entries[name].info.itemsize
        offsets = np.cumsum(sizes, axis=0)
        self._columns.update((rank, offsets[:, n]) for n, rank in enumerate(wanted))

    def start(self, name: str, rank: int) -> int:
        """Byte of `name`'s first box in a rank's data."""
        self.prepare([rank])
        return int(self._columns[rank][self._row[name]])

    def data_bytes(self, rank: int) -> int:
        """Of all boxes of a rank's file."""
        self.prepare([rank])
        return int(self._columns[rank][-1])

    def stored(self, rank: int) -> list[Stored]:
        """The boxes of a rank's file, in order."""
        found, start = [], 0
        for name in self.order:
            entry = self.entries[name]
            for n in self._written(entry.pattern, entry.pattern.phase(entry.turn), rank):
                box = entry.pattern.box(n)
                nbytes = box.volume * entry.info.itemsize
                found.append(Stored(name=name, box=box, dtype=entry.info.dtype, start=start, nbytes=nbytes))
                start += nbytes
        return found

    def _written(self, pattern: Pattern, phase: int, rank: int) -> list[int]:
        key = (pattern.number, phase, rank)
        if key not in self._boxes:
            self._boxes[key] = pattern.turn(phase).written_by(rank)
        return self._boxes[key]

    def header(self, rank: int, *, save: str) -> bytes:
        """Everything before the data of a rank's file. `save`: the id. Raises CheckpointError."""
        stored = self.stored(rank)
        tree: dict[str, object] = {
            "__metadata__": {"format": "ecdit-checkpoint", "format_version": "2", "id": save, "rank": str(rank)}
        }
        for s in stored:
            whole = s.box.size == self.entries[s.name].info.shape
            tree[s.name if whole else f"{s.name}{s.box}"] = {
                "dtype": SAFETENSORS_NAME[s.dtype],
                "shape": s.box.size,
                "data_offsets": (s.start, s.start + s.nbytes),
            }
        if len(tree) != len(stored) + 1:
            raise CheckpointError(
                f"two boxes of rank {rank} would have one name: a tensor may not be named like a box of another"
            )
        text = json.dumps(tree, separators=(",", ":")).encode()
        if len(text) + HEADER_MULTIPLE > MAX_HEADER_BYTES:
            raise CheckpointError(
                f"the header of rank {rank} has {len(text)} bytes; safetensors reads {MAX_HEADER_BYTES}"
            )
        text += b" " * (-(8 + len(text)) % HEADER_MULTIPLE)
        return len(text).to_bytes(8, "little") + text

    def at(self, rank: int, start: int, stop: int) -> list[Stored]:
        """The boxes that have bytes in [start, stop) of a rank's data."""
        stored = self.stored(rank)
        first = bisect.bisect_right([s.start for s in stored], start) - 1
        return [s for s in stored[max(first, 0) :] if s.start < stop and s.start + s.nbytes > start]


def file_name(rank: int) -> str:
    """Of the file that `rank` writes."""
    return f"rank_{rank:05d}.safetensors"


def sums_name(rank: int) -> str:
    """Of the checksums beside it."""
    return f"rank_{rank:05d}.sums"

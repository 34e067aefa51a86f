"""Which sample comes when: a pure function (seed, epoch, position) -> (shard, sample).

1. The shards of an epoch are permuted by a Feistel network keyed (seed, epoch), laid end to end on one axis, and the
   axis is turned by a keyed offset, so that the dropped tail is not always the same.
2. The axis is cut into C lanes of exactly equal length. A global batch takes global_batch / C samples of each lane:
   slot b belongs to lane b * C // global_batch. A batch therefore mixes C places of the data set.
3. Inside a lane, windows of about `window` shards are shuffled by a second network keyed (seed, epoch, lane, window).
4. A rank owns a contiguous slice of slots, hence whole lanes or a part of one, hence few shards.

Nothing here knows the number of ranks, and nothing is stored: a position is arithmetic. What is left over when the
samples do not fill whole global batches (fewer than one global batch per epoch) is dropped and counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from data_pipeline import feistel
from data_pipeline.errors import BadSplit

MAX_LANES = 1024
"""Mixing is as good as random from about here on (same-shard pairs 0.86 of ideal); more lanes hold more files open."""

_SHARDS, _TURN, _WINDOW = 1, 2, 3
"""Purposes: the first part of a key, so that the three uses of a seed are independent."""

_BLOCK = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Located:
    """Where samples lie."""

    shard: np.ndarray
    """int64 (K,)"""
    sample: np.ndarray
    """int64 (K,)"""
    passed_over: np.ndarray | None = None
    """bool (K,): True where a sample that was taken down came first; None where nothing is taken down"""


class Stream(Protocol):
    """What a loader asks of an order, be it of one data set, of what is kept of it, of several, or of a held-out part."""

    global_batch: int
    steps_per_epoch: int
    dropped_per_epoch: int
    """samples that one epoch leaves out, others in each"""

    def locate(self, position: np.ndarray, *, attempt: int | np.ndarray = 0) -> Located:
        """See `Order.locate`."""
        ...

    def shards_at_once(self, *, world: int, steps: int) -> int:
        """See `Order.shards_at_once`."""
        ...

    def identity(self) -> dict[str, int]:
        """What makes the order: part of the loader's state, and must be the same at a resume."""
        ...


@dataclass(frozen=True, kw_only=True)
class _Epoch:
    shards: np.ndarray
    """int32 (S,) shard number at rank R of the axis"""
    ends: np.ndarray
    """int64 (S,) first axis position after it"""
    turn: int


def default_lanes(num_shards: int, *, global_batch: int) -> int:
    """Largest divisor of the global batch that is at most the number of shards and `MAX_LANES`.

    A property of data and batch, never of the number of ranks: the order may not change when ranks do.
    """
    limit = max(1, min(num_shards, MAX_LANES, global_batch))
    return max(c for c in range(1, limit + 1) if global_batch % c == 0)


class Order:
    """The order of one data set. Positions are global: `step * global_batch + slot`, counted over all epochs.

    Args:
        shard_sizes: samples per shard (S,); empty shards are allowed.
        seed: 0 or above.
        global_batch: samples of one step over all ranks.
        lanes: C, a divisor of the global batch; None takes `default_lanes`.
        window: shards that one shuffle window spans.

    Raises:
        BadSplit: lanes do not divide the global batch, or there are fewer samples than one global batch.
    """

    def __init__(
        self, shard_sizes: Sequence[int] | np.ndarray, *, seed: int, global_batch: int,
        lanes: int | None = None, window: int = 2,
    ) -> None:  # fmt: skip
        self._size_S = np.asarray(shard_sizes, dtype=np.int64)
        num_samples, num_shards = int(self._size_S.sum()), int((self._size_S > 0).sum())
        if global_batch < 1 or num_samples < global_batch:
            raise BadSplit(f"global_batch = {global_batch}: must be 1 to the number of samples, {num_samples}")
        if seed < 0 or window < 1:
            raise BadSplit(f"seed = {seed}, window = {window}: seed must be 0 or above, window 1 or above")
        self.seed, self.global_batch, self.window = seed, global_batch, window
        self.lanes = default_lanes(num_shards, global_batch=global_batch) if lanes is None else lanes
        if self.lanes < 1 or global_batch % self.lanes:
            near = nearest_divisors(global_batch, value=self.lanes)
            raise BadSplit(f"lanes = {self.lanes}: must divide global_batch = {global_batch}; nearest: {near}")
        self.num_samples = num_samples
        self.steps_per_epoch = num_samples // global_batch
        self.epoch_len = self.steps_per_epoch * global_batch
        self.dropped_per_epoch = num_samples - self.epoch_len
        self._per_lane = global_batch // self.lanes
        self._lane_len = self.epoch_len // self.lanes
        self._window_len = max(1, min(self._lane_len, round(window * num_samples / num_shards)))
        self._epochs: dict[int, _Epoch] = {}

    @property
    def hop(self) -> int:
        """From a position to one in the next window of its lane."""
        return -(-self._window_len // self._per_lane) * self.global_batch

    def identity(self) -> dict[str, int]:
        return {"seed": self.seed, "global_batch": self.global_batch, "lanes": self.lanes, "window": self.window}

    def locate(self, position: np.ndarray, *, attempt: int | np.ndarray = 0) -> Located:
        """Shard and sample of every global position.

        Args:
            position: int64 (K,), from 0, any epochs.
            attempt: 0 is the sample itself. a > 0 is its a-th substitute: the a-th next index of the same shuffle
                window, so a substitute comes from nearby shards and is the same on every number of ranks.
        """
        position = np.atleast_1d(np.asarray(position, dtype=np.int64))
        epoch_K, place = np.divmod(position, self.epoch_len)
        step, slot = np.divmod(place, self.global_batch)
        lane = slot // self._per_lane
        window, inside = np.divmod(step * self._per_lane + slot % self._per_lane, self._window_len)
        size = np.minimum(self._window_len, self._lane_len - window * self._window_len)
        window_key = feistel.key(_WINDOW, self.seed, epoch_K, lane, window)
        inside = feistel.permute((inside + attempt) % size, size=size, key=window_key)
        axis = lane * self._lane_len + window * self._window_len + inside

        shard, sample = np.empty_like(position), np.empty_like(position)
        for epoch in np.unique(epoch_K):
            here = epoch_K == epoch
            table = self._epoch(int(epoch))
            turned = (axis[here] + table.turn) % self.num_samples
            rank = np.searchsorted(table.ends, turned, side="right")  # empty shards have no room, so none is hit
            shard[here] = table.shards[rank]
            sample[here] = turned - (table.ends[rank] - self._size_S[table.shards[rank]])
        return Located(shard=shard, sample=sample)

    def shards_at_once(self, *, world: int, steps: int) -> int:
        """About how many shards a rank has under way while it reads `steps` steps: of each of its lanes a window, what the steps
        reach of the next one, and a shard at either end."""
        reach = 2 * self._window_len + steps * self._per_lane
        mean = self.num_samples / max(1, int((self._size_S > 0).sum()))
        return (-(-self.lanes // world) + 1) * (math.ceil(reach / mean) + 2)

    def _epoch(self, epoch: int) -> _Epoch:
        """Prefix sums of one epoch: 12 bytes per shard, 14 ms for 120,000 shards, kept for the two latest epochs."""
        table = self._epochs.get(epoch)
        if table is None:
            num_shards = len(self._size_S)
            epoch_key = feistel.key(_SHARDS, self.seed, epoch)
            shard_R = np.empty(num_shards, np.int32)
            for first in range(0, num_shards, _BLOCK):  # a block at a time: the arithmetic takes ten such arrays
                block = np.arange(first, min(first + _BLOCK, num_shards))
                shard_R[block] = feistel.permute(block, size=num_shards, key=epoch_key)
            turn = int(feistel.key(_TURN, self.seed, epoch)[0] % np.uint64(self.num_samples))
            table = _Epoch(shards=shard_R, ends=np.cumsum(self._size_S[shard_R]), turn=turn)
            self._epochs = {**{k: v for k, v in self._epochs.items() if abs(k - epoch) == 1}, epoch: table}
        return table


class Tail:
    """The last samples of a data set in their own order, as a stream like `Order`: what is held out of the training.

    Raises:
        BadSplit: `num_samples` is not a whole number of global batches, or more than there are.
    """

    def __init__(self, shard_sizes: Sequence[int] | np.ndarray, *, num_samples: int, global_batch: int) -> None:
        sizes = np.asarray(shard_sizes, dtype=np.int64)
        total = int(sizes.sum())
        if num_samples < 1 or num_samples > total or num_samples % global_batch:
            near = max(global_batch, min(num_samples, total) // global_batch * global_batch)
            raise BadSplit(
                f"{num_samples} held-out samples of {total}: must be whole global batches of {global_batch}; nearest: {near}"
            )
        self._ends, self._sizes, self._first = np.cumsum(sizes), sizes, total - num_samples
        self.seed, self.window, self.lanes, self.global_batch = 0, 1, 1, global_batch
        self.epoch_len = self.num_samples = num_samples
        self.steps_per_epoch, self.dropped_per_epoch = num_samples // global_batch, 0
        self.hop = 64  # as many as `Narrowed` asks for at a place: the next ones

    def identity(self) -> dict[str, int]:
        return {"seed": self.seed, "global_batch": self.global_batch, "lanes": self.lanes, "window": self.window}

    def shards_at_once(self, *, world: int, steps: int) -> int:
        """As `Order.shards_at_once`: these are few, and all are kept."""
        return len(self._sizes) - int(np.searchsorted(self._ends, self._first, side="right"))

    def locate(self, position: np.ndarray, *, attempt: int | np.ndarray = 0) -> Located:
        """As `Order.locate`; the a-th substitute is the a-th next sample, around the end."""
        position = np.atleast_1d(np.asarray(position, dtype=np.int64))
        axis = self._first + (position + attempt) % self.num_samples
        shard = np.searchsorted(self._ends, axis, side="right")
        return Located(shard=shard, sample=axis - (self._ends[shard] - self._sizes[shard]))


def without_tail(shard_sizes: Sequence[int] | np.ndarray, *, num_samples: int) -> np.ndarray:
    """Sizes of the same shards (S,) without the last `num_samples` samples of the data set."""
    sizes = np.asarray(shard_sizes, dtype=np.int64)
    keep = int(sizes.sum()) - num_samples
    starts = np.cumsum(sizes) - sizes
    return np.clip(keep - starts, 0, sizes)


def nearest_divisors(number: int, *, value: int) -> str:
    """The divisors of `number` around `value`, for messages: "4 or 8"."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    below = [d for d in divisors if d <= value][-1:]
    above = [d for d in divisors if d > value][:1]
    return " or ".join(map(str, below + above))

"""The held-out part of a mixture: the last samples of each source, as many as its weight says, in their own order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_pipeline.errors import BadSplit
from data_pipeline.narrowed import Narrowed
from data_pipeline.order import Located, Order, Tail


def shared_out(number: int, *, weights: Sequence[int], global_batch: int) -> list[int]:
    """`number` samples over sources by weight, largest remainders first. Raises BadSplit unless they are whole global batches."""
    if number % global_batch:
        near = max(global_batch, number // global_batch * global_batch)
        raise BadSplit(f"{number} held-out samples: must be whole global batches of {global_batch}; nearest: {near}")
    total = sum(weights)
    parts = [number * weight // total for weight in weights]
    by_rest = sorted(range(len(weights)), key=lambda i: (-(number * weights[i] % total), i))
    for i in by_rest[: number - sum(parts)]:
        parts[i] += 1
    return parts


class HeldOut:
    """A `Stream` of some tails, one after the other, for ever."""

    def __init__(
        self, tails: Sequence[Order | Tail | Narrowed], *, first_shards: Sequence[int], global_batch: int
    ) -> None:
        self._tails, self._first_shards, self.global_batch = tails, first_shards, global_batch
        self._ends = np.cumsum([tail.epoch_len for tail in tails])
        self.epoch_len = int(self._ends[-1])
        self.steps_per_epoch, self.dropped_per_epoch = self.epoch_len // global_batch, 0

    def identity(self) -> dict[str, int]:
        return {"seed": 0, "global_batch": self.global_batch, "held_out": self.epoch_len}

    def shards_at_once(self, *, world: int, steps: int) -> int:
        return sum(tail.shards_at_once(world=world, steps=steps) for tail in self._tails)

    def locate(self, position: np.ndarray, *, attempt: int | np.ndarray = 0) -> Located:
        """As `Tail.locate`; a substitute is of the same source."""
        position = np.atleast_1d(np.asarray(position, dtype=np.int64))
        attempt = np.broadcast_to(np.asarray(attempt, np.int64), position.shape)
        axis = position % self.epoch_len
        tail = np.searchsorted(self._ends, axis, side="right")
        shard, sample, passed_over = np.empty_like(axis), np.empty_like(axis), np.zeros(len(axis), bool)
        for i in np.unique(tail).tolist():
            here = tail == i
            found = self._tails[i].locate(axis[here] - (self._ends[i - 1] if i else 0), attempt=attempt[here])
            shard[here], sample[here] = found.shard + self._first_shards[i], found.sample
            if found.passed_over is not None:
                passed_over[here] = found.passed_over
        return Located(shard=shard, sample=sample, passed_over=passed_over)

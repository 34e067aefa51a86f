"""An order over what is used of a data set: positions to kept samples, none of which is taken down."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_pipeline.bitmap import Bitmap
from data_pipeline.errors import TooManyBad
from data_pipeline.order import Located, Order, Tail
from data_pipeline.taken import is_taken
from data_pipeline.views import Kept

_TRIES = 64
"""Candidates of one shuffle window; where so many in a row are taken down, most of it is, and the next window is asked."""
_WINDOWS = 64


class Narrowed:
    """A `Stream` over another one.

    Args:
        stream: over as many samples of each shard as are kept, or over all.
        kept: which of them; None keeps all.
        taken: lists of those that are not to be delivered.
    """

    def __init__(self, stream: Order | Tail, *, kept: Kept | None, taken: Sequence[Bitmap]) -> None:
        self._stream, self._kept, self._taken = stream, kept, taken
        self.global_batch, self.steps_per_epoch = stream.global_batch, stream.steps_per_epoch
        self.dropped_per_epoch, self.epoch_len = stream.dropped_per_epoch, stream.epoch_len
        self.num_samples = stream.num_samples

    def identity(self) -> dict[str, int]:
        return self._stream.identity()

    def shards_at_once(self, *, world: int, steps: int) -> int:
        return self._stream.shards_at_once(world=world, steps=steps)

    def locate(self, position: np.ndarray, *, attempt: int | np.ndarray = 0) -> Located:
        """As `Order.locate`, of samples that are not taken down: attempt a is the a-th such candidate of the window. Where a window
        has no more, those of the same slot's next windows follow.

        Raises:
            TooManyBad: none in many windows.
            CorruptShard: a list's bits are not those that were written.
        """
        position = np.atleast_1d(np.asarray(position, dtype=np.int64))
        if not self._taken:
            return self._candidate(position, attempt=attempt)
        shard, sample = np.empty_like(position), np.empty_like(position)
        passed_over = np.zeros(len(position), bool)
        skip = np.broadcast_to(np.asarray(attempt, np.int64), position.shape).copy()  # good candidates still to pass by
        left = np.arange(len(position))
        for number in range(_TRIES * _WINDOWS):
            window, inside = divmod(number, _TRIES)
            found = self._candidate(position[left] + window * self._stream.hop, attempt=inside)
            taken = is_taken(self._taken, shard=found.shard, sample=found.sample)
            here = ~taken & (skip[left] == 0)
            shard[left[here]], sample[left[here]] = found.shard[here], found.sample[here]
            passed_over[left] |= taken
            skip[left] -= ~taken
            left = left[~here]
            if not len(left):
                return Located(shard=shard, sample=sample, passed_over=passed_over)
        files = ", ".join(str(one.path) for one in self._taken)
        raise TooManyBad(f"position {position[left[0]]}: all of {_WINDOWS} windows in a row are taken down by {files}")

    def _candidate(self, position: np.ndarray, *, attempt: int | np.ndarray) -> Located:
        located = self._stream.locate(position, attempt=attempt)
        if self._kept is None:
            return located
        return Located(shard=located.shard, sample=self._kept.select(located.shard, number=located.sample))

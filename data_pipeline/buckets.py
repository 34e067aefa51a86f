"""Buckets of picture sizes: every global batch is of one size, so that shapes are static in a step and routing groups are whole.

A bucket is a list of samples (`views`) and a height and width. Which one a step draws is a balanced sequence over the
number of whole batches that each holds, laid over the steps again and again; inside a bucket the batches come in an
order of its own. So a step knows its bucket, and its number among that bucket's steps, by arithmetic: no state.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline import feistel
from data_pipeline.bitmap import Bitmap, counts_of
from data_pipeline.errors import BadSplit
from data_pipeline.manifest import View
from data_pipeline.mixture import balanced
from data_pipeline.narrowed import Narrowed
from data_pipeline.order import Located, Order
from data_pipeline.views import Kept

MAX_STEPS = 1 << 20
"""Entries of the sequence of buckets; a second to make."""
_BUCKET = 5
"""Purpose: the first part of a key, as in `order`."""


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Samples that are trained on at one size, in pixels."""

    name: str
    height: int
    width: int
    samples: Bitmap


def _weights(steps: Sequence[int]) -> list[int]:
    """Their ratio in whole numbers; exact up to `MAX_STEPS` in sum, then to one in that many."""
    shortest = math.gcd(*steps)
    if sum(steps) // shortest <= MAX_STEPS:
        return [one // shortest for one in steps]
    return [max(1, round(one * MAX_STEPS / sum(steps))) for one in steps]


class Buckets:
    """A `Stream` of whole batches of one bucket each.

    Args:
        keeps: lists of what is used of the data set, whatever the bucket.
        taken: lists of what is not to be delivered.

    Raises:
        BadSplit: a bucket without a whole batch, or a sample in two of them.
    """

    def __init__(
        self, view: View, buckets: Sequence[Bucket], *, seed: int, global_batch: int, window: int = 2,
        keeps: Sequence[Bitmap] = (), taken: Sequence[Bitmap] = (),
    ) -> None:  # fmt: skip
        self.buckets = tuple(sorted(buckets, key=lambda bucket: bucket.name))
        lists = [bucket.samples for bucket in self.buckets]
        twice = sum(one.num_set for one in lists) - int(counts_of(lists, op=np.bitwise_or).sum())
        if twice or len({bucket.name for bucket in buckets}) < len(buckets):
            names = [bucket.name for bucket in self.buckets]
            raise BadSplit(f"buckets {names}: must have different names and samples; {twice} samples are in several")
        self.seed, self.global_batch, self.window = seed, global_batch, window
        self._streams = []
        self._steps: dict[str, int] = {}
        self._shas = []
        for bucket in self.buckets:
            kept = Kept(view, [bucket.samples, *keeps])
            if kept.sizes.sum() < global_batch:
                rule = f"must have a whole global batch of {global_batch}: give its samples to another bucket, or leave it out"
                raise BadSplit(f"bucket {bucket.name!r} has {kept.sizes.sum()} samples: {rule}")
            own = int(feistel.key(_BUCKET, seed, *bucket.name.encode())[0] >> np.uint64(1))
            order = Order(kept.sizes, seed=own, global_batch=global_batch, window=window)
            self._streams.append(Narrowed(order, kept=kept, taken=taken))
            self._steps[bucket.name] = order.steps_per_epoch
            self._shas.append(f"{bucket.name}\n{bucket.height}\n{bucket.width}\n{kept.sha256}")
        # Steps are what is shared out, so the shortest cycle is the sum of the weights.
        weights = _weights(list(self._steps.values()))
        self._weights = np.array(weights)
        self._sequence = balanced(weights)
        self._number = np.empty(len(self._sequence), np.int64)
        for i in range(len(weights)):
            mine = self._sequence == i
            self._number[mine] = np.arange(mine.sum())
        self.steps_per_epoch = sum(self._steps.values())
        self.epoch_len = self.steps_per_epoch * global_batch
        self.dropped_per_epoch = sum(stream.dropped_per_epoch for stream in self._streams)
        used = int(Kept(view, keeps).sizes.sum()) if keeps else view.num_samples
        self.in_no_bucket = used - sum(int(stream.num_samples) for stream in self._streams)
        """Samples that are used, but of no size."""

    def identity(self) -> dict[str, int]:
        words = "\n".join(["ecdit buckets", *self._shas]).encode()
        buckets = int.from_bytes(hashlib.sha256(words).digest()[:6], "little")
        return {"seed": self.seed, "global_batch": self.global_batch, "window": self.window, "buckets": buckets}

    def steps_of(self, name: str) -> int:
        """Of an epoch."""
        return self._steps[name]

    def of(self, step: int) -> Bucket:
        """What a step's batch is of."""
        return self.buckets[int(self._sequence[step % len(self._sequence)])]

    def locate(self, position: np.ndarray, *, attempt: int | np.ndarray = 0) -> Located:
        """As `Order.locate`; a substitute is of the same bucket."""
        position = np.atleast_1d(np.asarray(position, dtype=np.int64))
        attempt = np.broadcast_to(np.asarray(attempt, np.int64), position.shape)
        step, slot = np.divmod(position, self.global_batch)
        cycle, inside = np.divmod(step, len(self._sequence))
        bucket = self._sequence[inside]
        own = (cycle * self._weights[bucket] + self._number[inside]) * self.global_batch + slot
        shard, sample, passed_over = np.empty_like(position), np.empty_like(position), np.zeros(len(position), bool)
        for i in np.unique(bucket).tolist():
            here = bucket == i
            found = self._streams[i].locate(own[here], attempt=attempt[here])
            shard[here], sample[here] = found.shard, found.sample
            if found.passed_over is not None:
                passed_over[here] = found.passed_over
        return Located(shard=shard, sample=sample, passed_over=passed_over)

    def shards_at_once(self, *, world: int, steps: int) -> int:
        """The sum over the buckets, of which each may be the next."""
        return sum(stream.shards_at_once(world=world, steps=steps) for stream in self._streams)

"""Several data sources in one stream, in exact ratios: position -> (source, position in that source), by arithmetic.

Weights are whole numbers w_i with sum W. A balanced sequence of W entries names each source w_i times, no prefix more
than one entry off its share; laid over the batches again and again, it returns to the same place after a *cycle* of
T = W / gcd(W, global batch) steps, in which source i gives N_i samples. Those are numbered slot by slot, inside a slot
step by step: so a rank's consecutive slots are consecutive numbers of every source, as slots of one batch of N_i
samples are, and the source's own `Order` over batches of N_i keeps its lanes on their ranks. The position in source i
is `cycle * N_i + number`. Nothing is counted and nothing is stored.

A source that holds few batches of N_i would lose much of each epoch to the rule that epochs are whole batches, and all
ranks may well read all of it: it is permuted as a whole, and an epoch of it drops nothing.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from data_pipeline import feistel
from data_pipeline.contract import SourceProgress
from data_pipeline.errors import BadSplit
from data_pipeline.narrowed import Narrowed
from data_pipeline.order import MAX_LANES, Located, Order, Tail, default_lanes

MAX_CYCLE = 1 << 18
"""Entries of a cycle: 1.5 MB of tables."""
MAX_WEIGHT_SUM = 1 << 14
"""Finest share that is exact; others are rounded to about this."""
SMALL = 16
"""Batches of N_i below which a source is permuted as a whole."""
_FEW_SHARDS = 256
_SOURCE = 4
"""Purpose: the first part of a key, as in `order`."""


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Whole-numbered weights, and the length of the cycle that follows from them."""

    weights: tuple[int, ...]
    steps: int
    """T, of the shortest cycle"""
    rounded: bool

    @property
    def total(self) -> int:
        return sum(self.weights)

    def share(self, source: int) -> float:
        return self.weights[source] / self.total


def shares_of(weights: Mapping[str, float], *, global_batch: int) -> Shares:
    """Whole numbers in the ratio of weights as they are written (0.7 is seven tenths); rounded to the nearest that fit
    where their cycle would be too long.

    Raises BadSplit for weights that are not above 0, and for a share too small to be drawn in a cycle.
    """
    if not weights or any(not math.isfinite(weight) or weight <= 0 for weight in weights.values()):
        raise BadSplit(f"weights {dict(weights)}: must be numbers above 0")
    exact = [Fraction(str(weight)) for weight in weights.values()]
    exact = [weight / sum(exact) for weight in exact]
    total = math.lcm(*(weight.denominator for weight in exact))
    longest = max(MAX_CYCLE, global_batch)
    if total <= MAX_WEIGHT_SUM and math.lcm(total, global_batch) <= longest:
        whole, rounded = [int(weight * total) for weight in exact], False
    else:
        times = 1
        while global_batch * times < MAX_WEIGHT_SUM and global_batch * times * 2 <= longest:
            times *= 2
        whole, rounded = _rounded(exact, total=global_batch * times), True
        if not all(whole):
            lost = [name for name, weight in zip(weights, whole, strict=True) if not weight]
            raise BadSplit(
                f"weights {dict(weights)}: the share of {lost} is below one sample in {global_batch * times}"
            )
        shortest = math.gcd(*whole)
        whole = [weight // shortest for weight in whole]
    return Shares(weights=tuple(whole), steps=sum(whole) // math.gcd(sum(whole), global_batch), rounded=rounded)


def _rounded(exact: Sequence[Fraction], *, total: int) -> list[int]:
    """Largest remainders; ties to the first."""
    floors = [int(weight * total) for weight in exact]
    by_rest = sorted(range(len(exact)), key=lambda i: (floors[i] - exact[i] * total, i))
    for i in by_rest[: total - sum(floors)]:
        floors[i] += 1
    return floors


def balanced(weights: Sequence[int]) -> np.ndarray:
    """int16 (W,): each source as often as its weight, no prefix a whole entry or more off any share.

    The j-th entry of source i may stand from place floor(j W / w) on and before ceil((j + 1) W / w); taking of those
    that may the one whose time runs out first meets all these (proportionate fair scheduling).
    """
    total = sum(weights)
    coming = [(0, i, 0) for i in range(len(weights))]  # (first place, source, j)
    heapq.heapify(coming)
    ready: list[tuple[int, int, int]] = []
    sequence = np.empty(total, np.int16)
    for place in range(total):
        while coming and coming[0][0] <= place:
            _, i, j = heapq.heappop(coming)
            heapq.heappush(ready, (-(-(j + 1) * total // weights[i]), i, j))
        _, i, j = heapq.heappop(ready)
        sequence[place] = i
        if j + 1 < weights[i]:
            heapq.heappush(coming, ((j + 1) * total // weights[i], i, j + 1))
    return sequence


class Cycle:
    """The tables of a mixture.

    Args:
        sizes: used samples per shard of each source.
        names: of the sources; part of what their orders are keyed by.

    Raises BadSplit where a source has no samples.
    """

    def __init__(
        self, shares: Shares, *, sizes: Sequence[np.ndarray], names: Sequence[str], seed: int, global_batch: int, window: int
    ) -> None:  # fmt: skip
        self.shares, self.names, self.seed, self.global_batch, self.window = shares, names, seed, global_batch, window
        self._samples = [int(size.sum()) for size in sizes]
        self._shards = [int((size > 0).sum()) for size in sizes]
        for name, samples in zip(names, self._samples, strict=True):
            if samples == 0:
                raise BadSplit(f"source {name!r}: has no sample to draw")
        self.steps = shares.steps * self._repeats()
        per_weight = self.steps * global_batch // shares.total
        self.batches = tuple(weight * per_weight for weight in shares.weights)
        """N_i"""
        sequence = balanced(shares.weights)
        self.source_TB = np.tile(sequence, per_weight).reshape(self.steps, global_batch)
        """int16 (T, B) source of slot b in step t of a cycle"""
        by_slot = self.source_TB.T.ravel()
        number = np.empty(by_slot.shape, np.int32)
        counts = np.empty((self.steps + 1, len(names)), np.int64)
        for i in range(len(names)):
            mine = by_slot == i
            number[mine] = np.arange(mine.sum(), dtype=np.int32)
            counts[:, i] = np.concatenate([[0], np.cumsum((self.source_TB == i).sum(axis=1))])
        self.number_TB = np.ascontiguousarray(number.reshape(global_batch, self.steps).T)
        """int32 (T, B) its number among the source's samples of the cycle"""
        self._counts = counts

    def order(self, source: int, *, sizes: np.ndarray) -> Order:
        """Of one source; keyed by its name, so that two sources over one data set differ."""
        seed = int(feistel.key(_SOURCE, self.seed, *self.names[source].encode())[0] >> np.uint64(1))
        if self._is_small(source, batch=self.batches[source]):
            return Order(sizes, seed=seed, global_batch=1, lanes=1, window=self._shards[source])
        return Order(sizes, seed=seed, global_batch=self.batches[source], window=self.window)

    def delivered(self, source: int, *, step: int) -> int:
        """Samples of a source in the first `step` steps."""
        cycle, inside = divmod(step, self.steps)
        return cycle * self.batches[source] + int(self._counts[inside, source])

    def _is_small(self, source: int, *, batch: int) -> bool:
        return self._samples[source] < SMALL * batch

    def _repeats(self) -> int:
        """How many shortest cycles make one: the fewest for which every source has lanes enough to mix its shards."""
        shortest = self.shares.steps * self.global_batch
        best, most = 1, 0.0
        times = 1
        while times == 1 or times * shortest <= MAX_CYCLE:
            score = sum(
                self._mixes(i, batch=w * shortest * times // self.shares.total)
                for i, w in enumerate(self.shares.weights)
            )
            if score > most:
                best, most = times, score
            times *= 2
        return best

    def _mixes(self, source: int, *, batch: int) -> float:
        """1 where half as many lanes as there could be, or a small source as a whole; less below."""
        if self._is_small(source, batch=batch):
            return 1.0 if self._shards[source] <= _FEW_SHARDS else 0.25
        wanted = min(self._shards[source], MAX_LANES, batch)
        return min(1.0, 2 * default_lanes(self._shards[source], global_batch=batch) / wanted)


class Mixture:
    """A `Stream` of several sources.

    Args:
        streams: of each source, over positions of its own (`Cycle.order`, or narrowed).
        first_shards: number of each source's first shard among those of all.
    """

    def __init__(
        self, cycle: Cycle, *, streams: Sequence[Order | Tail | Narrowed], first_shards: Sequence[int]
    ) -> None:
        self.cycle, self._streams, self._first_shards = cycle, streams, first_shards
        self.global_batch = cycle.global_batch
        self.dropped_per_epoch = sum(stream.dropped_per_epoch for stream in streams)
        samples = sum(stream.epoch_len for stream in streams)
        self.steps_per_epoch = max(1, samples // self.global_batch)
        """Steps in which as many samples are delivered as the sources hold together."""

    def identity(self) -> dict[str, int]:
        return {
            "seed": self.cycle.seed, "global_batch": self.global_batch, "cycle": self.cycle.steps, "window": self.cycle.window
        }  # fmt: skip

    def locate(self, position: np.ndarray, *, attempt: int | np.ndarray = 0) -> Located:
        """As `Order.locate`; a substitute is of the same source."""
        position = np.atleast_1d(np.asarray(position, dtype=np.int64))
        attempt = np.broadcast_to(np.asarray(attempt, np.int64), position.shape)
        step, slot = np.divmod(position, self.global_batch)
        cycle, inside = np.divmod(step, self.cycle.steps)
        source, number = self.cycle.source_TB[inside, slot], self.cycle.number_TB[inside, slot]
        shard, sample = np.empty_like(position), np.empty_like(position)
        passed_over = np.zeros(len(position), bool)
        for i in np.unique(source).tolist():
            here = source == i
            place = cycle[here] * self.cycle.batches[i] + number[here]
            found = self._streams[i].locate(place, attempt=attempt[here])
            shard[here], sample[here] = found.shard + self._first_shards[i], found.sample
            if found.passed_over is not None:
                passed_over[here] = found.passed_over
        return Located(shard=shard, sample=sample, passed_over=passed_over)

    def shards_at_once(self, *, world: int, steps: int) -> int:
        """The sum over the sources; a batch of a source takes a whole cycle."""
        cycles = -(-steps // self.cycle.steps) + 1
        return sum(stream.shards_at_once(world=world, steps=cycles) for stream in self._streams)

    def epoch_steps(self, source: int) -> float:
        """Steps in which a source's samples come once; on average, since a batch has a sample of it more or less."""
        return self._streams[source].epoch_len / self.cycle.batches[source] * self.cycle.steps

    def progress(self, step: int) -> list[SourceProgress]:
        """Of every source before `step`."""
        made = []
        for i, (name, stream) in enumerate(zip(self.cycle.names, self._streams, strict=True)):
            samples = self.cycle.delivered(i, step=step)
            made.append(
                SourceProgress(
                    name=name, share=self.cycle.shares.share(i), samples=samples, epochs=samples / stream.epoch_len,
                    left_out=stream.dropped_per_epoch,
                )
            )  # fmt: skip
        return made

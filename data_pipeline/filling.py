"""From planned samples to filled slots: read, decode, and where a sample is bad the same substitute on every topology."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from data_pipeline.assemble import BatchBuffer
from data_pipeline.captions import NoCaptionError
from data_pipeline.catalogue import Shards
from data_pipeline.errors import SAMPLE_ERRORS, TooManyBad, Where
from data_pipeline.order import Stream
from data_pipeline.quarantine import BadSample
from data_pipeline.reader import ShardReader

MAX_ATTEMPTS = 16
"""Substitutes tried for one position. Sixteen bad samples in a row are a broken data set, not bad luck."""


@dataclass(kw_only=True)
class Filled:
    """What filling some slots has met."""

    bad: list[BadSample] = field(default_factory=list)
    skipped: int = 0


@dataclass(frozen=True, kw_only=True)
class Filler:
    """Fills slots of any batch of a stream; its calls share nothing but the reader, so threads may make them."""

    view: Shards
    order: Stream
    reader: ShardReader
    substitutes: bool
    """False: a bad sample's error is raised."""

    def fill(
        self, buffer: BatchBuffer, *, slots: Sequence[int], shards: Sequence[int], samples: Sequence[int]
    ) -> Filled:
        """Read and decode the samples of some slots.

        Raises:
            DataError: a bad sample, where none is substituted; a shard that cannot be read.
            TooManyBad: no substitute found for one position.
        """
        filled = Filled()
        for slot, first_shard, first_sample in zip(slots, shards, samples, strict=True):
            shard, sample, position = first_shard, first_sample, int(buffer.position[slot])
            for attempt in range(MAX_ATTEMPTS):
                if attempt:
                    located = self.order.locate(np.array([position]), attempt=attempt)
                    shard, sample = int(located.shard[0]), int(located.sample[0])
                try:
                    raw = self.reader.read(shard, sample=sample, position=position)
                    buffer.fill(slot, raw=raw, where=Where(self.view.shards[shard].name, raw.key, position))
                    break
                except NoCaptionError:
                    filled.skipped += 1
                except SAMPLE_ERRORS as error:
                    if not self.substitutes:
                        raise
                    filled.bad.append(
                        BadSample(
                            position=position, shard=self.view.shards[shard].name, sample=sample, attempt=attempt,
                            error=type(error).__name__, message=str(error),
                        )
                    )  # fmt: skip
            else:
                last = f"; last: {filled.bad[-1].message}" if filled.bad else ""
                raise TooManyBad(
                    f"position {position}: {MAX_ATTEMPTS} samples in a row are bad or without caption{last}"
                )
        return filled

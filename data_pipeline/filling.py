"""From planned samples to filled slots: read, decode, and where a sample is bad the same substitute on every topology."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from data_pipeline.assemble import BatchBuffer
from data_pipeline.captions import NoCaptionError
from data_pipeline.catalogue import Shards
from data_pipeline.decoders import ImageDecoder, Picture
from data_pipeline.errors import SAMPLE_ERRORS, DataError, TooManyBad, Where
from data_pipeline.order import Stream
from data_pipeline.quarantine import BadSample
from data_pipeline.readers import Reader
from data_pipeline.stages import LeftOutError, Stages
from data_pipeline.straight import Straight, Try

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
    reader: Reader
    decoder: ImageDecoder
    stages: Stages | None = None
    """What a user does to each sample before it is decoded."""
    straight: Straight | None = None
    """The short way for samples of arrays."""
    substitutes: bool
    """False: a bad sample's error is raised."""

    def fill(
        self, buffer: BatchBuffer, *, slots: Sequence[int], shards: Sequence[int], samples: Sequence[int]
    ) -> Filled:
        """Read and decode the samples of some slots, as many at once as the decoder takes.

        Raises:
            DataError: the first bad sample, where none is substituted; a shard that cannot be read.
            TooManyBad: no substitute found for one position.
        """
        filled = Filled()
        tries = list(map(Try, slots, shards, samples))
        if self.straight is not None:
            tries = self.straight.fill(buffer, tries)
        for first in range(0, len(tries), self.decoder.at_once):
            self._fill(buffer, tries[first : first + self.decoder.at_once], filled)
        return filled

    def _fill(self, buffer: BatchBuffer, tries: list[Try], filled: Filled) -> None:
        bad: list[BadSample] = []
        for attempt in range(MAX_ATTEMPTS):
            missed = self._attempt(buffer, tries)
            for one, error in missed:
                if error is None:
                    filled.skipped += 1
                elif not self.substitutes:
                    raise error
                else:
                    bad.append(self._bad(one, error, position=int(buffer.position[one.slot]), attempt=attempt))
            if not missed:
                filled.bad += sorted(bad, key=lambda sample: (sample.position, sample.attempt))
                return
            position = buffer.position[[one.slot for one, _ in missed]]
            located = self.order.locate(position, attempt=attempt + 1)
            tries = [
                Try(one.slot, int(shard), int(sample))
                for (one, _), shard, sample in zip(missed, located.shard, located.sample, strict=True)
            ]
        last = f"; last: {bad[-1].message}" if bad else ""
        raise TooManyBad(
            f"position {buffer.position[tries[0].slot]}: {MAX_ATTEMPTS} samples in a row are bad or left out{last}"
        )

    def _attempt(self, buffer: BatchBuffer, tries: Sequence[Try]) -> list[tuple[Try, DataError | None]]:
        """Those that failed, in slot order, with why; None where the sample is to be left out."""
        missed: dict[int, tuple[Try, DataError | None]] = {}
        pictures: list[tuple[int, Picture]] = []
        for number, one in enumerate(tries):
            try:
                picture = self._read(buffer, one)
                if picture is not None:
                    pictures.append((number, picture))
            except (NoCaptionError, LeftOutError):
                missed[number] = one, None
            except SAMPLE_ERRORS as error:
                missed[number] = one, error
        answers = self.decoder.decode([picture for _, picture in pictures]) if pictures else []
        for (number, _), answer in zip(pictures, answers, strict=True):
            if answer is not None:
                missed[number] = tries[number], answer
        return [missed[number] for number in sorted(missed)]

    def _read(self, buffer: BatchBuffer, one: Try) -> Picture | None:
        position = int(buffer.position[one.slot])
        raw = self.reader.read(one.shard, sample=one.sample, position=position)
        where = Where(self.view.shards[one.shard].name, raw.key, position)
        if self.stages is not None:
            raw = self.stages.run(raw, where=where)
        return buffer.fill(one.slot, raw=raw, where=where)

    def _bad(self, one: Try, error: DataError, *, position: int, attempt: int) -> BadSample:
        return BadSample(
            position=position, shard=self.view.shards[one.shard].name, sample=one.sample, attempt=attempt,
            error=type(error).__name__, message=str(error),
        )  # fmt: skip

"""Tars that nobody has indexed, and pipes: read from the front by webdataset itself, delivered **at least once**.

What has no index cannot be entered in the middle, so there is no exact place: a run that resumes begins at the first shard that was
not delivered whole to every rank, and its ranks see the samples behind that again. No sample is lost, whatever the number of ranks.
Everything else is the exact loader's: fields, captions, stages, decoders, quarantine, batches of one size on every rank.

1. Pass e takes all URLs in an order keyed (seed, e); shard k of the endless list is number k mod S of pass k div S.
2. A rank reads shards base + rank, base + rank + world, ... ; `base` is where the run began or resumed.
3. Of a rank's shards the first r are delivered whole. The smallest r of all ranks makes the next base: base + r * world.

A reader thread streams bytes, an assembler thread shuffles in a small buffer and makes batches, a pool decodes.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data_pipeline import feistel
from data_pipeline.assemble import BatchBuffer, Fields, shapes_of, usual_fields
from data_pipeline.captions import CaptionRule, NoCaptionError
from data_pipeline.contract import Batch, LoaderStats
from data_pipeline.decoders import ImageDecoder, Picture, PlainDecoder
from data_pipeline.errors import (
    SAMPLE_ERRORS,
    BadSplit,
    DataError,
    MissingShard,
    TooManyBad,
    Where,
    WrongView,
)  # fmt: skip
from data_pipeline.filling import MAX_ATTEMPTS
from data_pipeline.order import nearest_divisors
from data_pipeline.quarantine import BadSample, Quarantine
from data_pipeline.reader import RawSample
from data_pipeline.stages import LeftOutError, Stages
from data_pipeline.url_samples import probe, samples_of
from data_pipeline.urls import digest_of

LABEL = "streamed, at least once: a resume sees again what its ranks had of shards that were not delivered whole"
_ORDER, _BUFFER = 0x75726C73, 0x62756666
"""Purposes of keys."""
logger = logging.getLogger("ecdit.data")


@dataclass(frozen=True, slots=True)
class _Sample:
    turn: int
    """Which of this rank's shards it is of, counted from 0 at `base`."""
    number: int
    raw: RawSample
    url: str


@dataclass(frozen=True, slots=True)
class _End:
    """A shard's last sample has been read, or it broke."""

    turn: int
    url: str
    error: DataError | None = None


@dataclass(frozen=True, kw_only=True)
class _Made:
    batch: Batch
    turns: int
    """Shards of this rank of which nothing is left to deliver behind this batch."""
    bad: tuple[BadSample, ...]
    skipped: int
    bytes: int


class StreamedLoader:
    """Endless batches of one data-parallel rank from URLs. Implements `contract.Loader`, at least once.

    Args:
        urls: as `urls.expand` gives them.
        global_batch, rank, world, seed, fields, captions, resolution, threads, prefetch, on_bad, max_bad, quarantine, decoder,
            stages: as of `loader.StreamingLoader`; a shard that breaks off counts as one bad sample, and what it has not given
            is lost to this pass.
        shuffle: samples of the buffer from which each is drawn.
        agree: the smallest of a number over all ranks; called by `state_dict`, which is then collective.

    Raises:
        BadSplit: world does not divide global_batch.
        MissingShard: the first shard cannot be read.
    """  # fmt: skip

    def __init__(
        self, urls: Sequence[str], *, global_batch: int, rank: int = 0, world: int = 1, seed: int = 0,
        fields: Fields | None = None, captions: CaptionRule | None = None, resolution: int = 256,
        threads: int = 2, prefetch: int = 2, shuffle: int = 1000,
        on_bad: Literal["fail", "substitute"] = "fail", max_bad: float = 1e-4, quarantine: Path | None = None,
        decoder: ImageDecoder | None = None, stages: Stages | None = None, agree: Callable[[int], int] = int,
    ) -> None:  # fmt: skip
        if world < 1 or global_batch % world or not 0 <= rank < world:
            near = nearest_divisors(global_batch, value=world)
            raise BadSplit(f"rank {rank} of {world}: world must divide global_batch = {global_batch}; nearest: {near}")
        self.urls, self.seed, self.global_batch = tuple(urls), seed, global_batch
        self._rank, self._world, self._share = rank, world, global_batch // world
        probed = probe(self.urls, patient=on_bad == "substitute")
        self.fields = usual_fields(probed.fields) if fields is None else fields
        self._rule = replace(captions or CaptionRule(), sources=self.fields.captions, seed=seed)
        self._shapes = shapes_of(
            ((raw, Where("the first shard", raw.key)) for raw in probed.samples), fields=self.fields
        )
        self._resolution, self._prefetch, self._buffer = resolution, prefetch, max(1, shuffle)
        self._substitutes, self._max_bad, self._quarantine = on_bad == "substitute", max_bad, Quarantine(quarantine)
        self._decoder, self._stages, self._agree = decoder or PlainDecoder(), stages, agree
        self._pool = ThreadPoolExecutor(max(1, threads), thread_name_prefix="ecdit-data")
        self._base = self._step = self._turns = self._delivered = self._skipped = self._uncaptioned = self._bytes = 0
        self._bad: Counter[str] = Counter()
        self._stall_seconds = 0.0
        self._life: _Life | None = None
        logger.warning("%d URLs: %s", len(self.urls), LABEL)

    def __iter__(self) -> StreamedLoader:
        return self

    def __next__(self) -> Batch:
        """This rank's share of the next global step. Raises DataError as the exact loader does, and for a shard that breaks off."""
        began = time.perf_counter()
        if self._life is None:
            self._life = _Life(self, step=self._step)
        made = self._life.next()
        self._step += 1
        self._delivered += 1
        self._turns, self._bytes = made.turns, self._bytes + made.bytes
        self._skipped += made.skipped
        self._uncaptioned += 0 if made.batch.captioned is None else int((~made.batch.captioned).sum())
        self._bad.update(sample.error for sample in made.bad)
        self._quarantine.add(made.bad)
        limit = self._max_bad * max(self._delivered * self._share, 1000)
        if made.bad and self._bad.total() > limit:
            raise TooManyBad(
                f"{self._bad.total()} bad samples {dict(self._bad)} exceed max_bad = {self._max_bad:g} ({limit:.1f} samples); "
                f"last: {made.bad[-1].message}"
            )
        self._stall_seconds += time.perf_counter() - began
        return made.batch

    def mark(self) -> tuple[int, int]:
        """See `contract.Loader`."""
        return self._step, self._turns

    def state_dict(self, mark: tuple[int, int] | None = None) -> dict[str, Any]:
        """Equal on all ranks if `agree` asks them. `base` counts shards of the endless list that need not be read again."""
        step, turns = mark or self.mark()
        return {**self._identity(), "step": step, "base": self._base + self._agree(turns) * self._world}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises WrongView for other URLs, another seed or global batch, or the place of an exact stream."""
        wrong = [f"{k}: saved {state.get(k)!r}, here {v!r}" for k, v in self._identity().items() if state.get(k) != v]
        for name in ("step", "base"):
            if not isinstance(state.get(name), int) or state[name] < 0:
                wrong.append(f"{name}: saved {state.get(name)!r}, must be 0 or above")
        if wrong:
            raise WrongView(f"the saved loader state belongs to another stream: {'; '.join(wrong)}")
        self._end()
        self._step, self._base, self._turns = state["step"], state["base"], 0

    def stats(self) -> LoaderStats:
        return LoaderStats(
            steps=self._delivered, samples=self._delivered * self._share, bytes_read=self._bytes,
            decoder_fallbacks=self._decoder.fallbacks,
            stall_seconds=self._stall_seconds, bad=dict(self._bad), skipped=self._skipped, uncaptioned=self._uncaptioned,
        )  # fmt: skip

    def close(self) -> None:
        self._end()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._decoder.close()
        self._quarantine.close()

    def _identity(self) -> dict[str, Any]:
        return {
            "v": 1, "kind": "streamed", "seed": self.seed, "global_batch": self.global_batch, "urls": digest_of(self.urls)
        }  # fmt: skip

    def _end(self) -> None:
        if self._life is not None:
            self._life.stop()
            self._life = None

    def shards(self) -> Iterator[tuple[int, str]]:
        """(turn, URL) of this rank from `base` on, for ever."""
        number = len(self.urls)
        for turn in iter(range(2**62)):
            of, place = divmod(self._base + self._rank + turn * self._world, number)
            shard = feistel.permute(np.array([place]), size=number, key=feistel.key(_ORDER, self.seed, of))
            yield turn, self.urls[int(shard[0])]

    def decode(
        self, samples: list[_Sample], draw: Callable[[], _Sample], *, step: int
    ) -> tuple[Batch, list[BadSample], int, int]:
        """A batch of `samples`, in which what is bad or left out gives its slot to the next of the stream."""
        position = step * self.global_batch + self._rank * self._share + np.arange(self._share, dtype=np.int64)
        buffer = BatchBuffer(
            position,
            fields=self.fields,
            shapes=self._shapes,
            size=(self._resolution, self._resolution),
            captions=self._rule,
        )
        bad: list[BadSample] = []
        skipped, read = 0, sum(sample.raw.num_bytes for sample in samples)
        todo = list(enumerate(samples))
        for _ in range(MAX_ATTEMPTS):
            pieces = [todo[n :: self._pool._max_workers] for n in range(min(len(todo), self._pool._max_workers))]
            answers = [
                answer for piece in self._pool.map(lambda part: self._fill(buffer, part), pieces) for answer in piece
            ]
            todo = []
            for slot, sample, error in sorted(answers, key=lambda answer: answer[0]):
                if isinstance(error, DataError):
                    if not self._substitutes:
                        raise error
                    bad.append(
                        BadSample(
                            position=int(position[slot]), shard=sample.url, sample=sample.number, attempt=0,
                            error=type(error).__name__, message=str(error),
                        )
                    )  # fmt: skip
                elif error is not None:
                    skipped += 1
                if error is not None:
                    todo.append((slot, draw()))
            if not todo:
                return buffer.batch(), bad, skipped, read
        last = f"; last: {bad[-1].message}" if bad else ""
        raise TooManyBad(f"position {position[todo[0][0]]}: {MAX_ATTEMPTS} samples in a row are bad or left out{last}")

    def _fill(
        self, buffer: BatchBuffer, part: Sequence[tuple[int, _Sample]]
    ) -> list[tuple[int, _Sample, Exception | None]]:
        answers: dict[int, Exception | None] = {}
        pictures: list[tuple[int, Picture]] = []
        for slot, sample in part:
            where = Where(sample.url, sample.raw.key, int(buffer.position[slot]))
            answers[slot] = None
            try:
                raw = sample.raw if self._stages is None else self._stages.run(sample.raw, where=where)
                picture = buffer.fill(slot, raw=raw, where=where)
                if picture is not None:
                    pictures.append((slot, picture))
            except (NoCaptionError, LeftOutError, *SAMPLE_ERRORS) as error:
                answers[slot] = error
        for first in range(0, len(pictures), self._decoder.at_once):
            some = pictures[first : first + self._decoder.at_once]
            for (slot, _), answer in zip(some, self._decoder.decode([picture for _, picture in some]), strict=True):
                answers[slot] = answer
        return [(slot, sample, answers[slot]) for slot, sample in part]


class _Life:
    """The two threads between a place and the next; ended by `stop`, or by an error that `next` raises."""

    def __init__(self, loader: StreamedLoader, *, step: int) -> None:
        self._loader, self._step = loader, step
        self._stopped = threading.Event()
        self._ended: Exception | None = None
        self._read: queue.Queue[_Sample | _End | Exception] = queue.Queue(maxsize=max(2 * loader._share, 64))
        self._made: queue.Queue[_Made | Exception] = queue.Queue(maxsize=max(1, loader._prefetch))
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._reader, self._assembler)]
        for thread in self._threads:
            thread.start()

    def next(self) -> _Made:
        if self._ended is not None:
            raise self._ended
        found = self._made.get()
        if isinstance(found, Exception):
            self._ended = found  # its threads are gone: a next call would wait for ever
            self.stop()
            raise found
        return found

    def stop(self) -> None:
        """A thread inside of a slow server's read ends with the process."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(timeout=1.0)

    def _put(self, into: queue.Queue[Any], what: Any) -> None:
        while not self._stopped.is_set():
            try:
                into.put(what, timeout=0.1)
                return
            except queue.Full:
                continue
        raise _StoppedError

    def _get(self) -> _Sample | _End:
        while not self._stopped.is_set():
            try:
                found = self._read.get(timeout=0.1)
            except queue.Empty:
                continue
            if isinstance(found, Exception):
                raise found
            return found
        raise _StoppedError

    def _reader(self) -> None:
        fruitless = 0
        try:
            for turn, url in self._loader.shards():
                number, error = 0, None
                try:
                    for number, raw in enumerate(samples_of(url), start=1):
                        self._put(self._read, _Sample(turn, number - 1, raw, url))
                except DataError as broken:
                    error = broken
                self._put(self._read, _End(turn, url, error))
                fruitless = 0 if number else fruitless + 1
                if fruitless > len(self._loader.urls):
                    raise MissingShard(f"no sample in any of {len(self._loader.urls)} URLs; last: {error or 'empty'}")
        except _StoppedError:
            return
        except Exception as error:
            self._give_up(self._read, error)

    def _assembler(self) -> None:
        loader = self._loader
        buffer: list[_Sample] = []
        left: Counter[int] = Counter()
        """Samples in the buffer by turn."""
        ended: set[int] = set()
        turns = drawn = 0
        bad: list[BadSample] = []

        def draw() -> _Sample:
            nonlocal drawn
            while len(buffer) < loader._buffer:
                found = self._get()
                if isinstance(found, _Sample):
                    buffer.append(found)
                    left[found.turn] += 1
                    continue
                ended.add(found.turn)
                if found.error is not None:
                    if not loader._substitutes:
                        raise found.error
                    message, kind = str(found.error), type(found.error).__name__
                    bad.append(
                        BadSample(position=-1, shard=found.url, sample=-1, attempt=0, error=kind, message=message)
                    )
            key = feistel.key(_BUFFER, loader.seed, loader._base, loader._rank, drawn)
            drawn += 1
            place = int(key[0] % np.uint64(len(buffer)))
            buffer[place], buffer[-1] = buffer[-1], buffer[place]
            taken = buffer.pop()
            left[taken.turn] -= 1
            return taken

        try:
            while True:
                samples = [draw() for _ in range(loader._share)]
                batch, worse, skipped, read = loader.decode(samples, draw, step=self._step)
                while turns in ended and not left[turns]:
                    ended.discard(turns)
                    del left[turns]
                    turns += 1
                made = _Made(batch=batch, turns=turns, bad=(*bad, *worse), skipped=skipped, bytes=read)
                bad.clear()
                self._step += 1
                self._put(self._made, made)
        except _StoppedError:
            return
        except Exception as error:
            self._give_up(self._made, error)

    def _give_up(self, into: queue.Queue[Any], error: Exception) -> None:
        try:
            self._put(into, error)
        except _StoppedError:
            return


class _StoppedError(Exception):
    """Nobody waits any more."""

"""The stream: positions -> reads and decoding in threads -> batches in order -> a place of a few hundred bytes.

Work for a step is planned when an earlier step is delivered, so there is no background coordinator to die: the
consumer's own `next()` keeps `prefetch` steps under way in a thread pool (reading and libjpeg release the GIL).
Results are collected by step and slot, so the number of threads changes nothing but speed. The state counts
*delivered* steps; what was prefetched beyond is thrown away and read again after a resume.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data_pipeline.assemble import Allocate, BatchBuffer, Fields, check_fields, default_fields, probe_shapes
from data_pipeline.buckets import Buckets
from data_pipeline.captions import CaptionRule
from data_pipeline.catalogue import Shards
from data_pipeline.contract import Batch, LoaderStats
from data_pipeline.decoders import ImageDecoder, PlainDecoder
from data_pipeline.errors import BadSplit, DataError, TooManyBad
from data_pipeline.filling import Filled, Filler
from data_pipeline.manifest import View
from data_pipeline.memory import Recycled
from data_pipeline.mixture import Mixture
from data_pipeline.order import Located, nearest_divisors
from data_pipeline.place import Place
from data_pipeline.quarantine import BadSample, Quarantine
from data_pipeline.reader import held_for
from data_pipeline.readers import open_reader
from data_pipeline.sources import DataSet
from data_pipeline.stages import Stages
from data_pipeline.store.ahead import Reading
from data_pipeline.store.patience import Patience
from data_pipeline.straight import Straight

logger = logging.getLogger("ecdit.data")


@dataclass(kw_only=True)
class _Step:
    """A step under way: its buffer and one future per piece, each giving the bad samples it met."""

    number: int
    buffer: BatchBuffer
    pieces: list[Future[Filled]] = field(default_factory=list)
    passed_over: int = 0
    """positions whose own sample, or a substitute before the one that they get, was taken down"""

    def is_ready(self) -> bool:
        return all(piece.done() for piece in self.pieces)


class StreamingLoader:
    """Endless batches of one data-parallel rank. Implements `contract.Loader`.

    Args:
        view: an opened data set (`manifest.open_view`), or several, and what is used of them (`sources.open_data`).
        global_batch: samples of one step over all ranks.
        rank, world: data-parallel rank and size; world must divide global_batch.
        seed: of the order.
        fields: which members to decode; None takes `default_fields(view)`.
        captions: which caption is taken and what becomes of a sample without; its sources are those of `fields`.
        resolution: side R of the images in pixels (not used without an image field, nor with buckets).
        threads: decoding threads; 0 works in the caller's thread (debugging).
        prefetch: steps prepared ahead of the delivered one.
        lanes, window: see `order.Order`.
        on_bad: "fail" raises the sample's error; "substitute" takes the next sample of the shuffle window.
        max_bad: fraction of this rank's share of an epoch (or of what it has seen, when that is more) that may be
            substituted before TooManyBad stops the run.
        quarantine: JSON-lines file that gets one line per substitution (append only); give every rank its own.
        reading, patience: how an object store is read, and how long it is waited for.
        allocate: (shape, dtype) -> an array without content for a batch, as for memory that a device copies from; None uses the
            memory of batches again that nobody holds any more.
        held_out: the last samples of the data set are left out; of a mixture, of each source by its weight.
        decoder: of pictures; None is `decoders.PlainDecoder`.
        stages: a user's own, run on each sample before it is decoded.
        only_held_out: deliver those instead, in their own order, for ever; a whole number of global batches.

    Raises:
        BadSplit: sizes that do not divide (with the nearest that do), or a field that the data set lacks.
    """

    def __init__(
        self, view: View | DataSet, *, global_batch: int, rank: int = 0, world: int = 1, seed: int = 0,
        fields: Fields | None = None, captions: CaptionRule | None = None, resolution: int = 256,
        threads: int = 2, prefetch: int = 2, lanes: int | None = None, window: int = 2,
        on_bad: Literal["fail", "substitute"] = "fail", max_bad: float = 1e-4, quarantine: Path | None = None,
        held_out: int = 0, only_held_out: bool = False, decoder: ImageDecoder | None = None, stages: Stages | None = None,
        reading: Reading | None = None, patience: Patience | None = None, allocate: Allocate | None = None,
    ) -> None:  # fmt: skip
        if world < 1 or global_batch % world:
            near = nearest_divisors(global_batch, value=world)
            raise BadSplit(f"world = {world}: must divide global_batch = {global_batch}; nearest: {near}")
        if not 0 <= rank < world:
            raise BadSplit(f"rank = {rank}: must be 0 to {world - 1}")
        if on_bad not in ("fail", "substitute"):
            raise BadSplit(f"on_bad = {on_bad!r}: must be 'fail' or 'substitute'")
        self.data = DataSet.of(view)
        self.view = self.data.view
        self._fields = default_fields(self.view) if fields is None else fields
        check_fields(self._fields, view=self.view)
        of_captions = tuple(source.partition(":")[0] for source in self._fields.captions)
        single = [(name,) for name in (self._fields.latents, self._fields.text) if name is not None]
        self.data.check_members([self._fields.images, of_captions, *single])
        self.order = self.data.stream(
            seed=seed,
            global_batch=global_batch,
            lanes=lanes,
            window=window,
            held_out=held_out,
            only_held_out=only_held_out,
        )
        speaks = rank == 0 and not only_held_out
        self._place = Place(self.data, stream=self.order, speaks=speaks)
        self._rule = replace(captions or CaptionRule(), sources=self._fields.captions, seed=seed)
        self._slots = np.arange(rank * global_batch // world, (rank + 1) * global_batch // world, dtype=np.int64)
        self._resolution, self._threads = resolution, threads
        self._prefetch = prefetch if threads else 0  # without threads, ahead means only earlier
        self._max_bad, self._quarantine = max_bad, Quarantine(quarantine)
        self._allocate, self._decoder = allocate or Recycled(), decoder or PlainDecoder()
        self._lookahead = self._prefetch + 1
        if self.view.base:
            self._lookahead = _lookahead(
                self.view, budget=(reading or Reading()).budget, samples=len(self._slots), least=prefetch + 1
            )
        at_once = self.order.shards_at_once(world=world, steps=self._lookahead)
        self._reader = open_reader(
            self.view, held=held_for(at_once), reading=reading, patience=patience,
            reuse=self._decoder.at_once == 1,  # else several samples wait for their pixels
        )  # fmt: skip
        self._told: dict[int, Located] = {}
        """By step: those that the reader knows of and that are not under way."""
        self._shapes = probe_shapes(self._reader, view=self.view, fields=self._fields)
        self._filler = Filler(
            view=self.view, order=self.order, reader=self._reader, decoder=self._decoder,
            stages=stages, substitutes=on_bad == "substitute",
            straight=Straight(
                self._reader, fields=self._fields, shapes=self._shapes, captions=self._rule
            ) if stages is None and Straight.serves(self._reader, fields=self._fields) else None,
        )  # fmt: skip
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="ecdit-data") if threads else None
        self._pending: deque[_Step] = deque()
        self._step = 0
        self._bad: Counter[str] = Counter()
        self._skipped = self._uncaptioned = self._passed_over = 0
        self._delivered = self._ready = 0
        self._stall_seconds = 0.0
        if speaks:
            for line in self._place.lines():
                logger.info("%s", line)

    @property
    def steps_per_epoch(self) -> int:
        return self.order.steps_per_epoch

    def __iter__(self) -> StreamingLoader:
        return self

    def __next__(self) -> Batch:
        """This rank's share of the next global step.

        Raises:
            DataError: with on_bad="fail" the first bad sample of the step in slot order; always for a missing shard, a store
                that gives up, and whatever else ends a thread.
            TooManyBad: more substitutes than `max_bad` allows, or none found for one position.
        """
        began = time.perf_counter()
        self._ready = sum(1 for _ in takewhile(_Step.is_ready, self._pending))
        while len(self._pending) <= self._prefetch:
            started = self._start(self._step + len(self._pending))
            self._pending.append(started)
            self._told.pop(started.number, None)  # not before: what fails to start is started again
        step = self._pending[0]
        try:
            filled = [piece.result() for piece in step.pieces]
        except DataError:
            raise
        except Exception as error:
            words = f"step {step.number}: a decoding thread ended with {type(error).__name__}: {error}"
            raise DataError(f"{words}; this is a mistake in ecdit, not in the data: please report it") from error
        # Only now: an error above leaves the state at the step that was not delivered.
        self._pending.popleft()
        self._step += 1
        self._delivered += 1
        self._record([sample for piece in filled for sample in piece.bad])
        batch = step.buffer.batch()
        self._skipped += sum(piece.skipped for piece in filled)
        self._passed_over += step.passed_over
        self._uncaptioned += 0 if batch.captioned is None else int((~batch.captioned).sum())
        self._stall_seconds += time.perf_counter() - began
        return batch

    def mark(self) -> int:
        """See `contract.Loader`."""
        return self._step

    def state_dict(self, mark: int | None = None) -> dict[str, Any]:
        """See `contract.Loader`. `step` is the next one to deliver."""
        return self._place.state(self._step if mark is None else mark)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `contract.Loader`. Ranks, threads, prefetch, fields and resolution may differ from the saving run's; more samples
        may be taken down."""
        step = self._place.load(state)
        self._drop_pending()
        self._step = step

    def stats(self) -> LoaderStats:
        read = self._reader.stats()
        return LoaderStats(
            steps=self._delivered,
            steps_ahead=self._prefetch,
            steps_ready=self._ready,
            epochs=self._step / self.steps_per_epoch,
            decoder_fallbacks=self._decoder.fallbacks,
            samples=self._delivered * len(self._slots),
            bytes_read=read.bytes_read,
            stall_seconds=self._stall_seconds,
            read_retries=read.retries,
            store_trouble=read.trouble,
            requests=read.requests,
            bytes_fetched=read.bytes_fetched,
            hedged=read.hedged,
            hedges_won=read.hedges_won,
            most_held=read.most_held,
            index_reads=read.index_reads,
            bad=dict(self._bad),
            skipped=self._skipped,
            uncaptioned=self._uncaptioned,
            passed_over=self._passed_over,
            left_out=self.order.dropped_per_epoch,
            sources=self.order.progress(self._step) if isinstance(self.order, Mixture) else (),
        )

    def close(self) -> None:
        """Stop the threads and close the files. A closed loader delivers nothing more."""
        self._drop_pending()
        self._reader.stop()  # a thread may wait for bytes
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._decoder.close()
        self._reader.close()
        self._quarantine.close()

    def _start(self, number: int) -> _Step:
        """Plan a step and hand its pieces to the threads."""
        position = number * self.order.global_batch + self._slots
        located = self._locate(number)
        buffer = BatchBuffer(
            position, fields=self._fields, shapes=self._shapes, size=self._size(number), captions=self._rule,
            allocate=self._allocate,
        )  # fmt: skip
        passed_over = 0 if located.passed_over is None else int(located.passed_over.sum())
        step = _Step(number=number, buffer=buffer, passed_over=passed_over)
        # One piece per thread: fine enough to share a step evenly, coarse enough that a future's cost vanishes.
        for slots in np.array_split(np.arange(len(position)), max(1, min(self._threads, len(position)))):
            fill = partial(
                self._filler.fill, step.buffer,
                slots=slots.tolist(), shards=located.shard[slots].tolist(), samples=located.sample[slots].tolist(),
            )  # fmt: skip
            if self._pool is not None:
                step.pieces.append(self._pool.submit(fill))
            else:
                step.pieces.append(Future())
                step.pieces[-1].set_result(fill())
        return step

    def _size(self, number: int) -> tuple[int, int]:
        """Height and width of a step's pictures."""
        if isinstance(self.order, Buckets):
            bucket = self.order.of(number)
            return bucket.height, bucket.width
        return self._resolution, self._resolution

    def _locate(self, number: int) -> Located:
        """Where this step's samples lie; an object store is told of those of later steps as well."""
        if not self._reader.is_remote:
            return self.order.locate(number * self.order.global_batch + self._slots)
        for step in range(number, number + self._lookahead):
            if step not in self._told:
                located = self.order.locate(step * self.order.global_batch + self._slots)
                self._told[step] = located
                self._reader.ahead(step, shards=located.shard.tolist(), samples=located.sample.tolist())
        self._reader.plan(upto=number)
        return self._told[number]

    def _record(self, bad: list[BadSample]) -> None:
        """Count and write down what was substituted in a delivered step."""
        if not bad:
            return
        self._bad.update(sample.error for sample in bad)
        self._quarantine.add(bad)
        share = self.order.steps_per_epoch * len(self._slots)
        limit = self._max_bad * max(share, self._delivered * len(self._slots))
        if self._bad.total() > limit:
            raise TooManyBad(
                f"{self._bad.total()} bad samples {dict(self._bad)} exceed max_bad = {self._max_bad:g} "
                f"({limit:.1f} samples); last: {bad[-1].message}"
            )

    def _drop_pending(self) -> None:
        """Forget prefetched steps; threads finish the piece they are at."""
        for step in self._pending:
            for piece in step.pieces:
                piece.cancel()
        self._pending.clear()
        self._told.clear()
        self._reader.forget()


def _lookahead(view: Shards, *, budget: int, samples: int, least: int) -> int:
    """Steps of which an object store is told: as many as fill half of the budget, so that a new window's shards come bit by bit."""
    a_step = samples * view.num_bytes / max(1, view.num_samples)
    return max(least, min(64, int(budget / 2 / max(1.0, a_step))))

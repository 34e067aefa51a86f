"""Our order as the first stage of a webdataset pipeline, with a place that can be saved.

    source = ExactSource("data/images", seed=1, global_batch=256, rank=r, world=w)
    pipeline = ExactPipeline(source, wds.decode("rgb8"), wds.map(augment), wds.batched(32))
    for batch in pipeline: ...        # for ever
    state = pipeline.state_dict()     # below 1 KB; pipeline.load_state_dict(state) before the next `iter` goes on there

Each sample is what `wds.WebDataset` yields (`__key__`, `__url__`, fields as bytes) with `__position__`, its place in the endless
stream. `ExactPipeline` is a `wds.DataPipeline` that counts what came out of its last stage by these positions, so stages that take
and give in order (decode, map, select, batched) keep the resume exact, also those that hold a sample back (batched takes one of
the next batch). What comes out must still be dicts with `__position__`; wds.shuffle is refused that way as soon as it gives a
position out of order, and this order needs no further shuffling. Importing this imports webdataset, and with it torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import webdataset as wds
from torch.utils.data import IterableDataset, get_worker_info

from data_pipeline.errors import SAMPLE_ERRORS, BadSplit, BadStage, DataError, TooManyBad, WrongView
from data_pipeline.filling import MAX_ATTEMPTS
from data_pipeline.manifest import View, open_view
from data_pipeline.order import nearest_divisors
from data_pipeline.place import Place
from data_pipeline.reader import RawSample, held_for
from data_pipeline.readers import Reader, open_reader
from data_pipeline.sources import DataSet


class ExactSource(IterableDataset):
    """Args:
        data: a folder that `ecdit data index` has indexed, an opened view, or a whole data set (`sources.open_data`: mixtures,
            what is kept, what is taken down).
        seed: of the order.
        global_batch: samples of one step over all ranks; with the seed it decides the order.
        rank, world: data-parallel rank and size; world must divide global_batch.
        on_bad: "fail" raises a bad sample's error, "substitute" takes the same substitute as the trainer's loader.

    Inside a DataLoader with n workers, worker k yields every n-th sample of the rank, so that one that takes from its workers in
    turn delivers the order; the workers' states are then the loader's to keep (torchdata's StatefulDataLoader does).

    Raises:
        BadSplit: sizes that do not divide.
        DataError: of `manifest.open_view`.
    """  # fmt: skip

    def __init__(
        self, data: DataSet | View | Path | str, *, global_batch: int, seed: int = 0, rank: int = 0, world: int = 1,
        on_bad: Literal["fail", "substitute"] = "fail",
    ) -> None:  # fmt: skip
        data_set = DataSet.of(open_view(data) if isinstance(data, Path | str) else data)
        self.view = data_set.view
        if world < 1 or global_batch % world or not 0 <= rank < world:
            near = nearest_divisors(global_batch, value=world)
            raise BadSplit(f"rank {rank} of {world}: world must divide global_batch = {global_batch}; nearest: {near}")
        self.order = data_set.stream(seed=seed, global_batch=global_batch)
        self._place = Place(data_set, stream=self.order)
        self._share, self._world = global_batch // world, world
        self._first = rank * self._share
        self._substitutes = on_bad == "substitute"
        self._taken = 0
        self.bad: list[str] = []
        """A line for each sample that was replaced."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """From the place that was loaded, or from the start, for ever."""
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        reader = open_reader(self.view, held=held_for(self.order.shards_at_once(world=self._world, steps=1)))
        self._taken += (worker - self._taken) % workers
        try:
            while True:
                step, inside = divmod(self._taken, self._share)
                mine = np.arange(inside, self._share, workers)
                position = step * self.order.global_batch + self._first + mine
                located = self.order.locate(position)
                for where, shard, sample in zip(
                    position.tolist(), located.shard.tolist(), located.sample.tolist(), strict=True
                ):
                    found = self._read(reader, where, shard, sample)
                    # Before it is handed out: who holds a sample has taken it.
                    self._taken += workers
                    yield found
        finally:
            reader.close()

    def state_dict(self, *, taken: int | None = None) -> dict[str, Any]:
        """What was taken of this rank's share, here or, with `taken`, further on; `inside` counts samples of a step that is not
        whole, and fits this world only."""
        step, inside = divmod(self._taken if taken is None else taken, self._share)
        return {**self._place.state(step), "inside": inside, "world": self._world}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Where the next `iter` begins; on any world if a whole step was taken. Raises WrongView for another stream."""
        inside, world = state.get("inside"), state.get("world")
        if not isinstance(inside, int) or not 0 <= inside < self._share or (inside and world != self._world):
            rule = f"a part of a step goes on on {world} ranks only; on {self._world} a whole one does"
            raise WrongView(f"the saved state is {inside!r} samples into a step: {rule}")
        step = self._place.load({name: value for name, value in state.items() if name not in ("inside", "world")})
        self._taken = step * self._share + inside

    def seek(self, taken: int) -> None:
        """Where the next `iter` begins, in samples of this rank's share."""
        self._taken = taken

    def number_of(self, position: int) -> int:
        """Which of this rank's samples is at a position."""
        step, slot = divmod(position, self.order.global_batch)
        return step * self._share + slot - self._first

    def _read(self, reader: Reader, position: int, shard: int, sample: int) -> dict[str, Any]:
        last: DataError | None = None
        for attempt in range(MAX_ATTEMPTS):
            if attempt:
                located = self.order.locate(np.array([position]), attempt=attempt)
                shard, sample = int(located.shard[0]), int(located.sample[0])
            try:
                raw = reader.read(shard, sample=sample, position=position)
                return _sample(raw, url=str(self.view.tar(shard)), position=position)
            except SAMPLE_ERRORS as error:
                if not self._substitutes:
                    raise
                last = error
                self.bad.append(f"{type(error).__name__}: {error}")
        raise TooManyBad(f"position {position}: {MAX_ATTEMPTS} samples in a row are bad; last: {last}")


class ExactPipeline(wds.DataPipeline):
    """A `wds.DataPipeline` behind an `ExactSource`, with the place of what came out; works inside of StatefulDataLoader.

    Iterating raises BadStage where something comes out that is no dict with `__position__`, or out of order.
    """

    def __init__(self, source: ExactSource, *stages: Any) -> None:
        super().__init__(source, *stages)
        self._source = source
        self._delivered: int | None = None

    def __iter__(self) -> Iterator[Any]:
        if self._delivered is not None:
            self._source.seek(self._delivered)  # what stages held back comes again
        last = -1
        for found in super().__iter__():
            if not isinstance(found, Mapping) or "__position__" not in found:
                raise BadStage(
                    "what leaves an ExactPipeline must be dicts with __position__: its place is counted by them"
                )
            position = np.atleast_1d(np.asarray(found["__position__"]))
            if position[0] <= last or (np.diff(position) <= 0).any():
                raise BadStage(
                    f"position {position[0]} after {last}: stages of an ExactPipeline must keep the order (no shuffle)"
                )
            last = int(position[-1])
            self._delivered = self._source.number_of(last) + 1
            yield found

    def state_dict(self) -> dict[str, Any]:
        return self._source.state_dict(taken=self._delivered)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._source.load_state_dict(state)
        self._delivered = None


def _sample(raw: RawSample, *, url: str, position: int) -> dict[str, Any]:
    fields = {name: bytes(value) for name, value in raw.payloads.items()}
    return {"__key__": raw.key, "__url__": url, "__position__": position, **fields}

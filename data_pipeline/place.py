"""A loader's place in its stream: what a checkpoint holds of the data, and whether a saved one is a place in this stream."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from data_pipeline import taken
from data_pipeline.buckets import Buckets
from data_pipeline.errors import WrongView
from data_pipeline.history import advice
from data_pipeline.order import Stream
from data_pipeline.sources import DataSet

STATE_VERSION = 1
_WEIGHTS = (
    "; sources or weights are another stream: name those of before (data.sources), or start a new run from this one's weights "
    "(train.init_from)"
)
_KEPT = "; what is kept (data.keep) is part of the data set: name the files of before, or start from weights (train.init_from)"

logger = logging.getLogger("ecdit.data")


class Place:
    """What names the stream, and since when samples are taken down in it. One rank of a run `speaks`."""

    def __init__(self, data: DataSet, *, stream: Stream, speaks: bool = True) -> None:
        self._data, self._stream, self._speaks = data, stream, speaks
        self._identity = {**stream.identity(), **data.identity(global_batch=stream.global_batch)}
        self._since = 0

    def state(self, step: int) -> dict[str, Any]:
        """JSON-able, below 1 KB."""
        state = {"v": STATE_VERSION, "step": step, **self._identity}
        if self._data.take_downs.lists:
            state["taken"] = self._data.take_downs.state(since=self._since)
        return state

    def load(self, state: Mapping[str, Any]) -> int:
        """The saved step. Samples that were taken down since then count from there on, and that is said.

        Raises WrongView for another stream, with what changed and what one may do.
        """
        mine = {"v": STATE_VERSION, **self._identity}
        names = [*mine, *(name for name in state if name not in {*mine, "step", "taken"})]
        differ = [name for name in names if state.get(name) != mine.get(name)]
        wrong = [f"{name}: saved {state.get(name)!r}, here {mine.get(name)!r}" for name in differ]
        step = state.get("step")
        if not isinstance(step, int) or step < 0:
            wrong.append(f"step: saved {step!r}, must be 0 or above")
        if wrong:
            raise WrongView(
                f"the saved loader state belongs to another stream: {'; '.join(wrong)}{self._advice(state, differ)}"
            )
        assert isinstance(step, int)
        saved = state.get("taken", taken.NONE)
        self._since = self._data.take_downs.since(saved, step=step)
        now = self._data.take_downs.state(since=self._since)
        if self._speaks and now["lists"] > saved["lists"]:
            words = "from step %d on, %d samples of %d lists are taken down (before: %d of %d); the order is the same but for them"
            logger.warning(words, step, now["n"], now["lists"], saved["n"], saved["lists"])
        return step

    def lines(self) -> list[str]:
        """For the log of a run's start: what is read, and what an epoch leaves out."""
        view, left = self._data.view, self._stream.dropped_per_epoch
        used = sum(int(source.sizes.sum()) for source in self._data.sources)
        lines = [
            f"{view.folder}: {used:,} of {view.num_samples:,} samples are used, {self._stream.steps_per_epoch:,} steps an epoch"
        ]
        if left:
            lines.append(
                f"{left:,} of {used:,} samples ({left / used:.2%}) are left out of each epoch, others in each: what does not fill "
                f"a global batch of {self._stream.global_batch}"
            )
        if isinstance(self._stream, Buckets):
            if self._stream.in_no_bucket:
                lines.append(f"{self._stream.in_no_bucket:,} samples are in no bucket (data.buckets) and never come")
            for bucket in self._stream.buckets:
                steps = self._stream.steps_of(bucket.name)
                lines.append(
                    f"bucket {bucket.name}: {bucket.height} x {bucket.width} pixels, {steps:,} steps of an epoch"
                )
        if self._data.is_mixture:
            shares = self._data.shares(global_batch=self._stream.global_batch)
            total = sum(source.weight for source in self._data.sources)
            for i, source in enumerate(self._data.sources):
                asked = source.weight / total
                exact = f", asked {asked:.4%}" if shares.rounded else ""
                lines.append(
                    f"source {source.name}: {shares.weights[i]} of {shares.total} samples ({shares.share(i):.4%}{exact})"
                )
        if self._data.take_downs.lists:
            lines.append(f"{self._data.take_downs.state()['n']:,} samples are taken down")
        return lines

    def _advice(self, state: Mapping[str, Any], differ: list[str]) -> str:
        """What one may do, where data differ."""
        if "sources" in differ:
            return _WEIGHTS
        if "view_sha256" not in differ:
            return ""
        source = self._data.sources[0]
        if self._data.is_mixture:
            return _WEIGHTS
        if source.kept is not None:
            return _KEPT
        return f". {advice(source.view, wanted_sha256=str(state.get('view_sha256', '')))}"

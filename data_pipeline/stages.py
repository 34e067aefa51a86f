"""A user's webdataset stages behind our order: `[wds.decode("pil"), wds.map(f), wds.select(g)]` on each sample alone.

The stages run on a stream of one sample, for every slot of a batch, so order, ranks, threads and resume stay exact whatever
they do: what comes out belongs to the position that went in. Nothing comes out: the sample is left out and replaced, counted
as skipped. A stage that looks across samples (shuffle, batched) has no place here; `exact_source.ExactSource` stands before
whole pipelines of those.
Imports webdataset (and with it torch) only where stages are used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from data_pipeline.errors import BadStage, Where
from data_pipeline.reader import RawSample, Value

Stage = Any
"""A function from an iterator of samples to one, or an object whose `run` is one (`wds.PipelineStage`)."""


class LeftOutError(Exception):
    """The stages left a sample out."""


class Stages:
    """Args:
    stages: as of `wds.DataPipeline`, or any function from an iterator of samples to one. Several threads call them at once, so a
        stage keeps no state; a random draw is keyed by the sample's `__position__` (an int, the same on any number of ranks).
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        self._stages = tuple(stages)

    def run(self, raw: RawSample, *, where: Where) -> RawSample:
        """The sample that the stages make of one; webdataset's form goes in: `__key__`, `__url__`, fields as bytes.

        Raises:
            LeftOutError: they give none.
            BadStage: one of them raises, or gives several samples or no sample.
        """
        sample: dict[str, Any] = {"__key__": raw.key, "__url__": where.shard, "__position__": where.position}
        sample |= {name: bytes(value) if isinstance(value, memoryview) else value for name, value in raw.fields.items()}
        stream: Iterable[dict[str, Any]] = iter([sample])
        try:
            for stage in self._stages:
                stream = stage.run(stream) if hasattr(stage, "run") else stage(stream)
            found = list(_first(stream, 2))
        except Exception as error:
            raise BadStage(f"{where}: a stage raised {type(error).__name__}: {error}") from error
        if not found:
            raise LeftOutError
        if len(found) > 1 or not isinstance(found[0], Mapping):
            what = "several samples of one" if len(found) > 1 else f"a {type(found[0]).__name__}"
            rule = "a stage gives a dict for each sample, or none; what looks across samples is for ExactSource"
            raise BadStage(f"{where}: the stages gave {what}: {rule}")
        fields = {
            name: _value(value, name=name, where=where)
            for name, value in found[0].items()
            if not name.startswith("__") and value is not None
        }
        return RawSample(key=str(found[0].get("__key__", raw.key)), fields=fields, num_bytes=raw.num_bytes)


def _first(stream: Iterable[dict[str, Any]], count: int) -> Iterator[dict[str, Any]]:
    for number, sample in enumerate(stream, start=1):
        yield sample
        if number == count:
            return


def _value(value: Any, *, name: str, where: Where) -> Value:
    """As `assemble` takes it: bytes of a file, text, what a json holds, or an array."""
    if isinstance(value, bytes | bytearray | memoryview):
        return memoryview(value)
    if isinstance(value, str | dict | np.ndarray):
        return value
    if hasattr(value, "convert") and hasattr(value, "getbands"):  # PIL, as of wds.decode("pil")
        return np.asarray(value.convert("RGB"))
    if hasattr(value, "detach") and hasattr(value, "numpy"):
        return value.detach().cpu().numpy()
    raise BadStage(
        f"{where}: the stages gave {name} as {type(value).__name__}; must be bytes, text, dict, array or a PIL image"
    )

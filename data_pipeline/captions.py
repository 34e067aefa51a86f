"""Which of a sample's captions is taken, and what becomes of a sample that has none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from data_pipeline.decode import read_caption
from data_pipeline.errors import BadCaption, BadSplit, Where
from data_pipeline.feistel import key
from data_pipeline.reader import Value

Missing = Literal["bad", "skip", "unconditional"]
_PURPOSE = 0x63617074696F6E  # "caption"


class NoCaptionError(Exception):
    """A sample without a caption, where such samples are skipped."""


@dataclass(frozen=True, kw_only=True)
class CaptionRule:
    """Args:
        sources: `txt`, `json` (its key `caption`) or `json:KEY`.
        weights: of the sources; empty takes the first that a sample has. Otherwise one of those that it has is drawn, keyed by the
            sample's position in the stream: the same on any number of ranks, another in each epoch.
        missing: a sample without any is bad ("bad", as one that cannot be read), replaced and counted ("skip"), or trained on
            without text ("unconditional").
        seed: of the draws.

    Raises BadSplit where weights and sources differ in number, or no weight is above 0.
    """

    sources: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    missing: Missing = "bad"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.weights and (len(self.weights) != len(self.sources) or min(self.weights) < 0 or not sum(self.weights)):
            raise BadSplit(
                f"caption weights {self.weights}: must be one number for each of {self.sources}, none below 0, one above"
            )

    @property
    def fields(self) -> tuple[str, ...]:
        """The members that are read."""
        return tuple(dict.fromkeys(source.partition(":")[0] for source in self.sources))

    def choose(self, fields: Mapping[str, Value], *, where: Where) -> str | None:
        """The caption among a sample's fields; None to train on it without one.

        Raises:
            BadCaption: one that is there cannot be read; none is there ("bad").
            NoCaptionError: none is there ("skip").
        """
        found: list[tuple[str, float]] = []
        for number, source in enumerate(self.sources):
            payload = fields.get(source.partition(":")[0])
            if isinstance(payload, np.ndarray):
                raise BadCaption(f"{where}: {source} is an array instead of text")
            text = None if payload is None else read_caption(payload, source=source, where=where)
            if text is not None and (not self.weights or self.weights[number] > 0):
                found.append((text, self.weights[number] if self.weights else 1.0))
                if not self.weights:
                    return text
        if found:
            return self._draw(found, position=where.position)
        if self.missing == "bad":
            raise BadCaption(
                f"{where}: no caption ({', '.join(self.sources)}); the sample has {sorted(fields)}. Where that is usual: "
                "data.no_caption=unconditional or skip"
            )
        if self.missing == "skip":
            raise NoCaptionError
        return None

    def _draw(self, found: list[tuple[str, float]], *, position: int) -> str:
        if len(found) == 1:
            return found[0][0]
        left = int(key(self.seed, _PURPOSE, position)[0]) / 2**64 * sum(weight for _, weight in found)
        for text, weight in found:
            left -= weight
            if left < 0:
                return text
        return found[-1][0]

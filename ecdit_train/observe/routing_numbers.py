"""Routing by layer, timestep and expert, in a file of its own: `routing/numbers_00000100.json`, for the report and for W&B.

What a curve shows is in the log (`moe/...`); this is what a histogram or a heat map needs, too much for every record. A run writes
about a hundred of these files whatever its length.

Legend: T parts of the timesteps, E experts, K experts of a token (0 to E).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ecdit_train import atomic
from ecdit_train.errors import RunFolderError
from ecdit_train.run_folder import ROUTING, by_step, routing_numbers_path

from .metrics import Sums
from .routing_scalars import mean_timestep, of_layer
from .timesteps import BINS

FILES = 100
"""Files that a run writes, about."""
DIGITS = 3
"""Significant ones of what is no count: a picture shows no more, and 64 experts in 20 layers stay under 30 kB."""


@dataclass(frozen=True, kw_only=True)
class LayerNumbers:
    """One sparse layer over all tokens of a step; NaN where there was nothing."""

    spread: np.ndarray
    """(T, K) int64: tokens of images in a part of the timesteps that so many experts took."""
    entropy: np.ndarray
    """(T,): mean over tokens, as a share of log E."""
    edge_margin: np.ndarray
    """(T,): see `moe/edge_margin`; by the timestep of the last token that was taken."""
    load: np.ndarray
    """(E,): the expert's share of the layer's rows, times E. 1 for all under expert choice."""
    gate: np.ndarray
    """(E,): its share of the layer's gates, times E."""
    timestep: np.ndarray
    """(E,): mean timestep of the tokens that it took."""

    @property
    def unselected(self) -> np.ndarray:
        """(T,): share of tokens that no expert took."""
        return _over(self.spread[:, 0], self.spread.sum(1))

    @property
    def experts_per_token(self) -> np.ndarray:
        """(T,): mean."""
        return _over(self.spread @ np.arange(self.spread.shape[1]), self.spread.sum(1))

    @property
    def most(self) -> np.ndarray:
        """(T,): the largest number of experts of a token; NaN where there was none."""
        K = np.arange(self.spread.shape[1])
        return np.where(self.spread.any(1), np.where(self.spread > 0, K, 0).max(1), math.nan)


@dataclass(frozen=True, kw_only=True)
class RoutingNumbers:
    """Of one step: all microbatches, all ranks."""

    step: int
    experts: int
    layers: Mapping[int, LayerNumbers]
    """By the number of the block, counted from 1."""

    @classmethod
    def of(cls, sums: Sums, *, step: int, layers: Sequence[int]) -> RoutingNumbers | None:
        """None where nothing was counted: a dense network, or a step without a record."""
        if not layers or "moe/0/microbatches" not in sums:
            return None
        made = {number: _layer(of_layer(sums, number)) for number in layers}
        return cls(step=step, experts=next(iter(made.values())).load.size, layers=made)

    def save(self, run: Path) -> Path:
        """Into a run folder that is there. Raises OSError."""
        path = routing_numbers_path(run, step=self.step)
        path.parent.mkdir(exist_ok=True)
        layers = {str(number): _plain(layer) for number, layer in self.layers.items()}
        document = {"step": self.step, "experts": self.experts, "timesteps": BINS, "layers": layers}
        atomic.write(path, json.dumps(document, separators=(",", ":")).encode(), make_folder=False)
        return path

    @classmethod
    def load(cls, path: Path) -> RoutingNumbers:
        """Raises RunFolderError for a missing or damaged file."""
        try:
            document = json.loads(path.read_text())
            E = int(document["experts"])
            layers = {int(number): _read(layer, experts=E) for number, layer in document["layers"].items()}
            return cls(step=int(document["step"]), experts=E, layers=layers)
        except Exception as error:  # a damaged file may hold anything
            raise RunFolderError(f"{path}: not a file of routing numbers ({type(error).__name__}: {error})") from error


def numbers_of(run: Path) -> list[tuple[int, Path]]:
    """(step, file) of all that a run has written, in order."""
    return by_step(run / ROUTING, suffix=".json", prefix="numbers_")


def written_at(step: int, *, log_every: int, steps: int) -> bool:
    """Whether the record of `step` has such a file beside it."""
    every = log_every * max(1, math.ceil(steps / FILES / log_every))
    return step % every == 0 or step == steps


def _layer(of: Mapping[str, np.ndarray]) -> LayerNumbers:
    tokens_T, load_E = of["spread"].sum(1), of["expert_rows"].sum(0)
    E = load_E.size
    timestep_E = np.where(load_E > 0, mean_timestep(of), math.nan)
    return LayerNumbers(
        spread=of["spread"].astype(np.int64),
        entropy=_over(of["entropy"] / math.log(max(2, E)), tokens_T),
        edge_margin=_over(of["margin"], of["edges"]),
        load=E * load_E / max(load_E.sum(), 1.0),
        gate=E * of["expert_gate"] / max(of["expert_gate"].sum(), 1e-30),
        timestep=timestep_E,
    )


def _over(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(part.shape, math.nan), where=whole > 0)


def _plain(layer: LayerNumbers) -> dict[str, Any]:
    """JSON: a histogram ends at its last entry, NaN is null."""
    written: dict[str, Any] = {"spread": [np.trim_zeros(row, "b").tolist() for row in layer.spread]}
    for name in ("entropy", "edge_margin", "load", "gate", "timestep"):
        written[name] = [_short(value) for value in getattr(layer, name).tolist()]
    return written


def _short(value: float) -> float | None:
    if not math.isfinite(value):
        return None
    short = float(f"{value:.{DIGITS}g}")
    return int(short) if short.is_integer() else short


def _read(layer: Mapping[str, Any], *, experts: int) -> LayerNumbers:
    spread = np.zeros((len(layer["spread"]), experts + 1), np.int64)
    for row, counts in zip(spread, layer["spread"], strict=True):
        row[: len(counts)] = counts
    names = ("entropy", "edge_margin", "load", "gate", "timestep")
    rest = {name: np.array([math.nan if v is None else v for v in layer[name]], float) for name in names}
    return LayerNumbers(spread=spread, **rest)

"""Do objects get more experts than the background? The paper's Figure 6 as numbers: experts per patch by layer and timestep, on
true pictures whose objects are known and on pictures that the model draws itself, with the spread over seeds.

A seed stands for other pictures and other noise of the same weights; how far two trainings differ is not in the spread.

Legend: R seeds, T timesteps, L sparse layers, n pictures, K patches of a picture, S pixels per side.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ecdit_train import atomic
from ecdit_train.model.assignment import experts_per_token

from .pictures import SamplePipeline
from .routing_probe import TIMESTEPS, KnownPictures, looks

Objects = Callable[[np.ndarray], np.ndarray]
"""uint8 pictures (n, S, S, 3) -> bool (n, S, S): what is no background."""

LEAST = 0.5
"""A patch shows an object where at least this share of its pixels does."""
ALIKE = 2.0
"""Times the standard error: a difference below it is none."""


def on_patches(painted: np.ndarray, *, side: int) -> np.ndarray:
    """(n, S, S) bool pixels -> (n, side^2) bool patches."""
    n, S, _ = painted.shape
    share = painted.reshape(n, side, S // side, side, S // side).mean((2, 4))
    return (share >= LEAST).reshape(n, -1)


def _mixed(on_object_nK: np.ndarray) -> np.ndarray:
    """(n,) bool: pictures with both kinds of patches."""
    return np.asarray(on_object_nK.any(1) & ~on_object_nK.all(1))


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """Experts per patch of one kind of pictures."""

    pictures: int
    """Over all seeds."""
    left_out: int
    """Pictures that show no object, or nothing else."""
    timesteps: tuple[float, ...]
    on_object: np.ndarray
    """(R, T, L) mean experts per patch that shows an object; NaN where a seed has no picture left."""
    on_background: np.ndarray
    """(R, T, L)."""
    unselected_object: np.ndarray
    """(R, T, L) share of such patches that no expert takes."""
    unselected_background: np.ndarray
    """(R, T, L)."""
    auc: np.ndarray
    """(R, T, L): how often a patch with an object has more experts than one without, equal numbers counted half. 0.5: alike."""

    def ratio(self) -> tuple[float, float]:
        """Experts per object patch over experts per background patch, over timesteps and layers: mean over seeds, and its
        standard error (infinite for one seed)."""
        with np.errstate(divide="ignore", invalid="ignore"):
            every_R = self.on_object.mean((1, 2)) / self.on_background.mean((1, 2))
        ratio_R = [float(x) for x in every_R if np.isfinite(x)]
        if not ratio_R:
            return float("nan"), float("inf")
        error = statistics.stdev(ratio_R) / len(ratio_R) ** 0.5 if len(ratio_R) > 1 else float("inf")
        return statistics.fmean(ratio_R), error

    def says(self) -> str:
        """What it means, in words."""
        ratio, error = self.ratio()
        if np.isnan(ratio):
            return "no picture shows an object beside a background"
        if np.isinf(error):
            return (
                f"object patches get {ratio:.2f} times the experts of background patches (one seed: no spread is known)"
            )
        if abs(ratio - 1) <= ALIKE * error:
            return f"object and background patches get alike: {ratio:.2f} times, within its error of {error:.1g}"
        word = "more" if ratio > 1 else "less"
        return f"object patches get {word}: {ratio:.2f} +- {error:.1g} times the experts of background patches"


@dataclass(kw_only=True)
class _Sums:
    """Of one seed: counts of patches by kind, layer and timestep."""

    on_object: list[list[float]] = field(default_factory=list)
    on_background: list[list[float]] = field(default_factory=list)
    unselected_object: list[list[float]] = field(default_factory=list)
    unselected_background: list[list[float]] = field(default_factory=list)
    auc: list[list[float]] = field(default_factory=list)

    def add(self, counts_LN: np.ndarray, on_object_N: np.ndarray) -> None:
        """One timestep."""
        rows: list[list[float]] = [[], [], [], [], []]
        for counts_N in counts_LN:
            on, off = counts_N[on_object_N], counts_N[~on_object_N]
            known = len(on) and len(off)
            values = (
                (on.mean(), off.mean(), (on == 0).mean(), (off == 0).mean(), auc(on, off))
                if known
                else (float("nan"),) * 5
            )
            for row, value in zip(rows, values, strict=True):
                row.append(float(value))
        for name, row in zip(vars(self), rows, strict=True):
            getattr(self, name).append(row)


def auc(on: np.ndarray, off: np.ndarray) -> float:
    """P(on > off) + P(on = off) / 2 of whole numbers, by counting."""
    most = int(max(on.max(), off.max())) + 1
    on_share, off_share = (np.bincount(x.astype(np.int64), minlength=most) / len(x) for x in (on, off))
    below = np.concatenate([[0.0], off_share.cumsum()[:-1]])
    return float((on_share * (below + off_share / 2)).sum())


def on_true_pictures(
    pipeline: SamplePipeline,
    known: Callable[[int], KnownPictures],
    *,
    seeds: Sequence[int],
    timesteps: Sequence[float] = TIMESTEPS,
) -> Allocation:
    """`known(seed)`: pictures with known objects. Noise differs by seed, too. Every rank looks at all of them."""
    sums, pictures, left_out = [], 0, 0
    for seed in seeds:
        shown = known(seed)
        usable_n = _mixed(shown.on_object)
        pictures, left_out = pictures + len(usable_n), left_out + int((~usable_n).sum())
        own = _Sums()
        for look in looks(pipeline, shown, timesteps=timesteps, noise_seed=seed):
            counts = torch.stack([experts_per_token(a).flatten() for a in look.prediction.assignments]).cpu().numpy()
            counts_LnK = counts.reshape(len(counts), len(usable_n), -1)[:, usable_n]
            own.add(counts_LnK.reshape(len(counts), -1), shown.on_object[usable_n].flatten())
        sums.append(own)
    return _allocation(sums, timesteps=timesteps, pictures=pictures, left_out=left_out)


def on_drawn_pictures(
    pipeline: SamplePipeline, prompts: Sequence[str], *, seeds: Sequence[int], step: int, objects: Objects
) -> Allocation:
    """What the model draws of the prompts, with starting noise of each seed; routing as it was while they were drawn, the captioned
    half of guidance. What is an object is decided on the finished picture."""
    side = pipeline.config.latent_side // pipeline.config.model.patch
    sums, left_out = [], 0
    timesteps: Sequence[float] = ()
    for seed in seeds:
        drawn = pipeline.draw(prompts, how=replace(pipeline.config.sample, seed=seed), step=step)
        assert drawn.maps is not None, "a dense network routes nothing"
        timesteps = [round(float(t), 4) for t in drawn.maps.timesteps]
        on_object_nK = on_patches(objects(drawn.images), side=side)
        usable_n = _mixed(on_object_nK)
        left_out += int((~usable_n).sum())
        own = _Sums()
        for counts_LnHW in drawn.maps.counts:
            counts_Lm = counts_LnHW[:, usable_n].reshape(len(counts_LnHW), -1)
            own.add(counts_Lm, on_object_nK[usable_n].flatten())
        sums.append(own)
    return _allocation(sums, timesteps=timesteps, pictures=len(prompts) * len(seeds), left_out=left_out)


def _allocation(sums: Sequence[_Sums], *, timesteps: Sequence[float], pictures: int, left_out: int) -> Allocation:
    arrays = {name: np.array([getattr(own, name) for own in sums]) for name in vars(sums[0])}
    return Allocation(timesteps=tuple(timesteps), pictures=pictures, left_out=left_out, **arrays)


# --- as files and words ----------------------------------------------------------------------------------------------

ARRAYS = ("on_object", "on_background", "unselected_object", "unselected_background", "auc")


def document(kinds: dict[str, Allocation], **about: Any) -> dict[str, Any]:
    """JSON: of each kind and array, mean and spread (standard deviation over seeds) by timestep and layer, and every seed's."""
    return {**about, "kinds": {name: _as_json(kind) for name, kind in kinds.items()}}


def _as_json(kind: Allocation) -> dict[str, Any]:
    ratio, error = kind.ratio()
    tables: dict[str, Any] = {}
    for name in ARRAYS:
        x_RTL = getattr(kind, name)
        spread_TL = x_RTL.std(0, ddof=1) if len(x_RTL) > 1 else np.full(x_RTL.shape[1:], np.nan)
        tables[name] = {"mean": _numbers(x_RTL.mean(0)), "spread": _numbers(spread_TL), "seeds": _numbers(x_RTL)}
    return {
        "pictures": kind.pictures,
        "left_out": kind.left_out,
        "timesteps": list(kind.timesteps),
        "ratio": _numbers(np.array(ratio)),
        "ratio_error": _numbers(np.array(error)),
        "says": kind.says(),
        **tables,
    }


def _numbers(x: np.ndarray) -> Any:
    """Nested lists; null where there is no number."""
    if x.ndim:
        return [_numbers(row) for row in x]
    return round(float(x), 6) if np.isfinite(x) else None


def write(made: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(path, (json.dumps(made, indent=1) + "\n").encode())


def table(kind: Allocation, *, layers: Sequence[int]) -> str:
    """Experts per patch, a line for each layer and timestep."""
    lines = [
        f"{'layer':>5}{'t':>7}{'object':>16}{'background':>16}{'AUC':>7}{'object unselected':>20}{'background unselected':>24}"
    ]
    for number, layer in enumerate(layers):
        for place, t in enumerate(kind.timesteps):
            told = {name: getattr(kind, name)[:, place, number] for name in ARRAYS}
            lines.append(
                f"{layer:>5}{t:>7.2f}{_said(told['on_object']):>16}{_said(told['on_background']):>16}"
                f"{told['auc'].mean():>7.2f}{told['unselected_object'].mean():>20.1%}"
                f"{told['unselected_background'].mean():>24.1%}"
            )
    return "\n".join(lines)


def _said(x_R: np.ndarray) -> str:
    return f"{x_R.mean():.2f} +- {x_R.std(ddof=1):.2f}" if len(x_R) > 1 else f"{x_R.mean():.2f}"

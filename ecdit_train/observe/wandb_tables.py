"""What W&B gets besides curves: results as numbers and tables, and routing as histograms. Pure.

A result is a file that `ecdit evaluate` or `ecdit allocation` wrote; at W&B each is a run of its own in the training's group.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ecdit_train.errors import RunFolderError
from ecdit_train.run_folder import ALLOCATION, routing_numbers_path

TASKS = ("task", "correct", "chance", "step")
ALLOC = (
    *("layer", "t", "object mean", "object spread", "background mean", "background spread"),
    *("AUC", "unselected object", "unselected background", "kind"),
)
"""A row for each kind of pictures, layer and timestep; spreads are standard deviations over seeds."""


@dataclass(frozen=True, kw_only=True)
class Table:
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    """None where there is no number."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One file, as W&B is to show it."""

    suite: str
    """`shapes`, `allocation`."""
    step: int
    numbers: Mapping[str, float]
    """`eval/{suite}/...`."""
    tables: Mapping[str, Table]
    pictures: Mapping[str, Path]
    """PNGs beside the file."""


@dataclass(frozen=True, kw_only=True)
class Counted:
    """A histogram of whole numbers."""

    counts: tuple[int, ...]
    edges: tuple[float, ...]
    """One more than counts: number k lies between k - 0.5 and k + 0.5."""


def read(path: Path) -> Result:
    """Raises RunFolderError for a file of another form."""
    try:
        made = json.loads(path.read_bytes())
        return _allocation(path, made) if "kinds" in made else _evaluation(path, made)
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise RunFolderError(f"{path}: not a result ({type(error).__name__}: {error})") from error


def _evaluation(path: Path, made: Mapping[str, Any]) -> Result:
    suite, step = path.stem.rpartition("_")[0] or path.stem, int(made["step"])
    tasks: Mapping[str, float] = made.get("by_task", {})
    chances: Mapping[str, float] = made.get("chance_by_task", {})
    numbers = {name: value for name, value in made.items() if isinstance(value, int | float) and name != "step"}
    numbers |= {task: float(share) for task, share in tasks.items()}
    rows = [(task, float(share), chances.get(task), step) for task, share in tasks.items()]
    if rows and "overall" in made:
        rows.append(("overall", made["overall"], made.get("chance"), step))
    return Result(
        suite=suite,
        step=step,
        numbers={f"eval/{suite}/{name}": value for name, value in numbers.items()},
        tables={f"eval/{suite}/tasks": Table(columns=TASKS, rows=tuple(rows))} if rows else {},
        pictures={},
    )


def _allocation(path: Path, made: Mapping[str, Any]) -> Result:
    rows, numbers = list[tuple[Any, ...]](), dict[str, float]()
    for name, kind in made["kinds"].items():
        rows += _rows(name, kind, layers=made["layers"])
        ratios = {"ratio": kind["ratio"], "ratio_error": kind["ratio_error"]}
        numbers |= {f"eval/{ALLOCATION}/{name}_{key}": value for key, value in ratios.items() if value is not None}
    picture = path.with_suffix(".png")
    return Result(
        suite=ALLOCATION,
        step=int(made["step"]),
        numbers=numbers,
        tables={"alloc": Table(columns=ALLOC, rows=tuple(rows))},
        pictures={"alloc_picture": picture} if picture.is_file() else {},
    )


def _rows(name: str, kind: Mapping[str, Any], *, layers: Sequence[int]) -> list[tuple[Any, ...]]:
    told = [
        *(kind[key][part] for key in ("on_object", "on_background") for part in ("mean", "spread")),
        *(kind[key]["mean"] for key in ("auc", "unselected_object", "unselected_background")),
    ]
    return [
        (layer, t, *(table_TL[place][number] for table_TL in told), name)
        for number, layer in enumerate(layers)
        for place, t in enumerate(kind["timesteps"])
    ]


def histograms(run: Path, step: int) -> dict[str, Counted]:
    """Experts per token of each sparse layer over all timesteps, as the record of `step` has them in the file beside it; empty
    where there is none."""
    from .routing_numbers import RoutingNumbers  # imports torch, which a configuration with this sink must not

    path = routing_numbers_path(run, step=step)
    if not path.exists():
        return {}
    try:
        numbers = RoutingNumbers.load(path)
    except RunFolderError:
        return {}  # a damaged file is told where it is asked for
    found = {}
    for layer, of in numbers.layers.items():
        counts = np.trim_zeros(of.spread.sum(0), "b")
        if counts.size:
            edges = np.arange(counts.size + 1) - 0.5
            found[f"routing/L{layer}/experts_per_token"] = Counted(
                counts=tuple(counts.tolist()), edges=tuple(edges.tolist())
            )
    return found

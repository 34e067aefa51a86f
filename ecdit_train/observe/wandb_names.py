"""What a run is called at W&B, so that runs can be told apart and put together. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_NAME, MAX_TAG = 128, 64
"""W&B's own bounds, in characters."""
SWEEP_FILES = ("sweep.json", "multirun.yaml")
"""In the folder of a sweep, whose runs lie below it and are called by what differs between them."""


@dataclass(frozen=True, kw_only=True)
class Names:
    name: str
    """Run folder, then what the folder does not say: experiment, experts, seed."""
    group: str
    """The sweep's folder, or the experiment."""
    tags: tuple[str, ...]
    """Width and layers, router, layout, precision, and the user's own."""


def names(folder: Path, config: Mapping[str, Any], *, tags: Sequence[str] = ()) -> Names:
    """From the run folder and the whole configuration as a tree."""
    folder = folder.absolute()
    moe, model, experiment = _of(config, "moe"), _of(config, "model"), str(config.get("experiment", ""))
    router = _router(moe)
    parts = [folder.name]
    if experiment and experiment not in folder.name:
        parts.append(experiment)
    if router != "dense":
        parts.append(f"{moe.get('num_experts')}e")
    if (seed := _of(config, "train").get("seed")) is not None:
        parts.append(f"seed {seed}")
    sweep = next((p for p in list(folder.parents)[:2] if any((p / file).exists() for file in SWEEP_FILES)), None)
    own = [f"{model.get('layers')}x{model.get('width')}" if model else "", router]
    own += [_layout(_of(config, "parallel")), str(_of(config, "train").get("precision", ""))]
    kept = dict.fromkeys(tag[:MAX_TAG] for tag in [*own, *tags] if tag)
    return Names(
        name=", ".join(parts)[:MAX_NAME], group=(sweep.name if sweep else experiment or folder.name), tags=(*kept,)
    )


def slug(text: str) -> str:
    """Letters and digits alone, for addresses."""
    return re.sub(r"[^a-z0-9]+", "", text.lower())


def scheduled_as(environ: Mapping[str, str]) -> str | None:
    """The job that this life runs in, where Slurm knows one."""
    return environ.get("SLURM_JOB_ID") or None


def _of(config: Mapping[str, Any], section: str) -> Mapping[str, Any]:
    found = config.get(section)
    return found if isinstance(found, Mapping) else {}


def _router(moe: Mapping[str, Any]) -> str:
    router = moe.get("router")
    return str(router.get("_target_", "")).rsplit(".", 1)[-1] if isinstance(router, Mapping) else "dense"


def _layout(parallel: Mapping[str, Any]) -> str:
    """`tp2 ep8 replicate4`, degrees of 1 left out; empty for one that says nothing."""
    degrees = {"tp": parallel.get("tp", 1), "ep": parallel.get("ep", 1), "replicate": parallel.get("dp_replicate", 1)}
    return " ".join(f"{name}{degree}" for name, degree in degrees.items() if isinstance(degree, int) and degree > 1)

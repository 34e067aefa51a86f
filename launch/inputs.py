"""What a job needs beside the cluster, looked at before it waits in a queue: data and encoders, a run folder that can be written, a
plan that fits into the GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ecdit_train.config.convert import to_dict
from ecdit_train.config.schema import RunConfig
from ecdit_train.config.validate import slots_of
from ecdit_train.errors import Problem
from ecdit_train.run_folder import CHECKPOINTS
from launch.mounts import outside

PLAN_SECONDS = 300.0
"""How long the plan may take; most of it is the import of torch."""
MANIFEST = "manifest.json"
"""What makes a folder a data set (`data_pipeline.manifest`, which a login node need not import)."""


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What the plan said."""

    problems: tuple[Problem, ...] = ()
    checkpoint_bytes: float = 0.0
    """0 where it is not known."""
    note: str | None = None
    """Why there is no plan, if there is none."""


def problems(cfg: RunConfig) -> Iterator[Problem]:
    """What is not there, seen from this machine and folder, where the job will look for it too."""
    mounts = cfg.cluster.mounts if cfg.cluster.container else ()
    lists: list[tuple[str, str]] = []
    for name, source in cfg.data.named.items():
        field = f"data.sources.{name}" if cfg.data.sources else "data"
        shards = outside(source.shards, mounts=mounts)
        if "://" not in source.shards and not (shards / MANIFEST).is_file():
            what = f"has no {MANIFEST}" if shards.is_dir() else "is not a folder"
            rule = f"{shards} {what}; `ecdit data` makes a data set, and all nodes must see it"
            yield Problem(field=f"{field}.shards", value=source.shards, rule=rule)
        lists += [(f"{field}.keep", path) for path in source.keep]
    lists += [(f"data.buckets.{name}.samples", bucket.samples) for name, bucket in cfg.data.buckets.items()]
    for key, path in [*lists, *(("data.take_down", path) for path in cfg.data.take_down)]:
        if not (there := outside(path, mounts=mounts)).is_file():
            yield Problem(field=key, value=path, rule=f"{there} is not there; all nodes must see it")
    for key, slot in slots_of(cfg).items():
        for path in slot.paths():
            if not (there := outside(path, mounts=mounts)).exists():
                yield Problem(field=f"{key}.path", value=path, rule=f"{there} is not there; all nodes must see it")
    first = cfg.train.init_from
    if first is not None and not (there := outside(first, mounts=mounts) / CHECKPOINTS).is_dir():
        yield Problem(field="train.init_from", value=first, rule=f"{there} is not there: not a run with checkpoints")
    yield from _writable(cfg)


def _writable(cfg: RunConfig) -> Iterator[Problem]:
    folder = Path(cfg.run).absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        yield Problem(field="run", value=cfg.run, rule=f"{folder} is not a folder")
    elif not os.access(folder, os.W_OK | os.X_OK):
        yield Problem(field="run", value=cfg.run, rule=f"{folder} cannot be written by you")


def plan(cfg: RunConfig) -> Planned:
    """The run's memory as `ecdit plan` computes it. Nothing on a CPU, where the figures of the machine room are for plans only."""
    if cfg.cluster.gpu == "cpu":
        return Planned()
    try:
        said = _ask_the_plan(cfg)
    except _NoPlanError as error:
        return Planned(note=f"the memory was not checked: {error}")
    if said["fits"]:
        return Planned(checkpoint_bytes=said["checkpoint_bytes"])
    rule = f"{said['verdict']} (`ecdit plan` with the same words shows layouts that do)"
    return Planned(problems=(Problem(field="cluster.gpu_memory", value=cfg.cluster.gpu_memory, rule=rule),))


def checkpoint_bytes(cfg: RunConfig) -> float:
    """Of one checkpoint, whatever the GPUs; 0 where the plan does not say."""
    try:
        return float(_ask_the_plan(cfg)["checkpoint_bytes"])
    except _NoPlanError:
        return 0.0


class _NoPlanError(Exception):
    """Says why."""


def _ask_the_plan(cfg: RunConfig) -> dict[str, Any]:
    """What `ecdit_train.plan.fits` answers, in a process of its own: this one imports no torch."""
    command = [sys.executable, "-P", "-m", "ecdit_train.plan.fits"]
    try:
        done = subprocess.run(
            command, input=json.dumps(to_dict(cfg)), capture_output=True, text=True, timeout=PLAN_SECONDS, check=False
        )
        said: dict[str, Any] = json.loads(done.stdout) if done.returncode == 0 else {}
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise _NoPlanError(str(error)) from error
    if not said:
        raise _NoPlanError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    return said

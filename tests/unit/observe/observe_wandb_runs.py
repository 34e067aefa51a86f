"""Sinks on run folders of a test, and what W&B would show of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from observe_wandb_file import history, run_files

from ecdit_train.evaluate.allocation import Allocation
from ecdit_train.observe.journal import read_records
from ecdit_train.observe.sinks import SinkContext, Sinks, open_sinks
from ecdit_train.observe.wandb_run import STEP
from ecdit_train.observe.wandb_sink import Wandb, WandbSink

CONFIG: dict[str, Any] = {
    "experiment": "shapes_tiny",
    "model": {"layers": 4, "width": 128},
    "moe": {"router": {"_target_": "a.b.ExpertChoice"}, "num_experts": 8},
    "parallel": {"tp": 1, "ep": 2, "dp_replicate": 1},
    "train": {"seed": 17, "precision": "fp32"},
}


def asked(**words: Any) -> Wandb:
    default = {"mode": "offline", "project": "test", "rows": "committed", "tags": ()}
    return Wandb(**{**dict.fromkeys(("entity", "name", "group", "notes")), **default, **words})


def about(run: Path, *, life: int = 1, after: int = 0, config: Any = CONFIG) -> SinkContext:
    return SinkContext(folder=run, name="n", config=config, resume_step=after, life=life)


def opened(run: Path, *, life: int = 1, after: int = 0, **words: Any) -> Sinks:
    """The journal and W&B, as a life of a run has them."""
    return open_sinks(about(run, life=life, after=after), {"wandb": asked(**words)}, rank=0, life=life)


def sink(run: Path, *, life: int = 1, after: int = 0, config: Any = CONFIG, **words: Any) -> WandbSink:
    how = {name: words.pop(name) for name in ("queue_size", "close_timeout") if name in words}
    return WandbSink(about(run, life=life, after=after, config=config), asked(**words), **how)


def shown(run: Path) -> list[dict[str, Any]]:
    """Rows of all of the run's offline files, as W&B gets them: file after file."""
    return [row for path in run_files(run) for row in history(path)]


def same(rows: list[dict[str, Any]], run: Path) -> bool:
    """Whether rows are the journal's records: the same steps once each, in order, with the same values."""
    ours = [{"step": row[STEP]} | {k: v for k, v in row.items() if k[0] != "_" and k != STEP} for row in rows]
    truth = [{k: v for k, v in record.items() if k != "time"} for record in read_records(run)]
    plain = [{k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()} for row in ours]
    return plain == truth and [row["_step"] for row in rows] == [record["step"] for record in truth]


def allocated(*, seeds: int) -> Allocation:
    """(R, T, L) = (seeds, 2, 3), each cell another number."""
    names = ("on_object", "on_background", "unselected_object", "unselected_background", "auc")
    arrays: dict[str, Any] = {
        name: np.arange(seeds * 6, dtype=float).reshape(seeds, 2, 3) + 100 * n for n, name in enumerate(names, start=1)
    }
    return Allocation(pictures=4, left_out=1, timesteps=(0.25, 0.75), **arrays)

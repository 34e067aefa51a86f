"""Workers of test_dist_checkpoint.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dist_runs import Layout, Life, configure, copy_checkpoints, live

from ecdit_train.build import build_trainer
from ecdit_train.checkpoint import store
from ecdit_train.errors import CheckpointError
from ecdit_train.parallel.placement import local

FIRST, STEPS = 4, 14
RUN = (
    "moe.num_experts=2",
    "moe.router.capacity_factor=1.0",
    "train.microbatch=2",
    f"train.steps={STEPS}",
    "checkpoint.every_steps=1000",
)


def sources(here: Any, folder: Path, shards: Path, layouts: dict[str, Layout]) -> dict[str, Life]:
    """A few steps under each layout, saved."""
    return {
        name: live(here, folder / name, shards, (*RUN, *layout.words), stop_after=FIRST)
        for name, layout in layouts.items()
    }


def pairs(here: Any, folder: Path, shards: Path, layouts: dict[str, Layout], wanted: list[tuple[str, str]]
          ) -> dict[tuple[str, str], Life]:  # fmt: skip
    """For each (source, target): what was saved under the one goes on under the other for ten steps."""
    out = {}
    for source, target in wanted:
        run = folder / f"{source}-to-{target}"
        copy_checkpoints(here, folder / source, run)
        out[source, target] = live(here, run, shards, (*RUN, *layouts[target].words))
    return out


def naive(here: Any, folder: Path, shards: Path, layouts: dict[str, Layout]) -> dict[str, list[str]]:
    """What becomes of a save that passes local shards as if they were whole: with and without a comparison of copies,
    and with the parameters' own placements as far as torch knows them."""
    out: dict[str, list[str]] = {}
    for name, layout in layouts.items():
        trainer = build_trainer(configure(here, folder / name, shards, *RUN, *layout.words), here, stop_after=None)
        trainer.close()
        tensors, ranks = trainer.state.tensors(), trainer.parallel.runtime
        answers = []
        for how, values in (
            ("refuse", tensors),
            ("refuse", {n: local(t) for n, t in tensors.items()}),
            ("trust", tensors),
        ):
            try:
                store.save(
                    folder / name / f"naive-{len(answers)}",
                    step=1,
                    tensors=values,
                    objects={},
                    comm=ranks,
                    replicas=how,
                )  # type: ignore[arg-type]
                answers.append("saved")
            except CheckpointError as e:
                answers.append(str(e))
        out[name] = answers
    return out

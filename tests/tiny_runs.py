"""Runs that take a second: two layers of width 64 on 16 x 16 pixels, built by the real composition root."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.loader import StreamingLoader
from ecdit_train.build import build_trainer
from ecdit_train.config.compose import compose
from ecdit_train.config.schema import RunConfig
from ecdit_train.config.validate import validate
from ecdit_train.parallel.runtime import start
from ecdit_train.supervise.stop import StopRequest
from ecdit_train.train.trainer import Trainer

WORDS = (
    "experiment=shapes_tiny",
    "model.layers=2",
    "model.width=64",
    "model.heads=1",
    "model.text_width=64",
    "model.text_refiner_layers=1",
    "encoders.text.width=32",
    "encoders.text.max_tokens=8",
    "data.resolution=16",
    "moe.num_experts=4",
    "moe.group_size=16",
    "train.steps=12",
    "train.global_batch=8",
    "train.microbatch=4",
    "optim.warmup_steps=3",
    "checkpoint.every_steps=4",
    "checkpoint.save=blocking",
    "observe.log_every=1",
    "observe.sample_every=0",
    "observe/sinks=none",
    "sample.steps=2",
)
ROUTERS = {
    "expert_choice": ("moe=expert_choice",),
    "token_choice": ("moe=token_choice",),
    "threshold": ("moe=threshold",),
    "expert_race": ("moe=expert_race", "moe.num_experts=4", "moe.router.capacity_factor=1.0"),
    "nucleus": ("moe=nucleus",),
    "diffmoe": ("moe=diffmoe", "moe.scope=group"),  # groups that do not depend on the microbatch, as the others'
    "dense": ("moe=dense",),
}
VOLATILE = ("time", "perf/", "mem/", "ckpt/", "data/loader/", "samples/", "data/stall_frac")
"""Of a record: what measures this life's machine, not the run."""


def words(run: Path | str, shards: Path | str, *extra: str) -> list[str]:
    """The command line of a tiny run."""
    return [*WORDS, f"run={run}", f"data.shards={shards}", *extra]


def configure(run: Path | str, shards: Path | str, *extra: str) -> RunConfig:
    config = compose(words(run, shards, *extra), local=False)
    validate(config, world=1)
    return config


@dataclass(frozen=True, kw_only=True)
class Life:
    """One start of a run until it ended or stopped."""

    finished: bool
    step: int
    tensors: dict[str, Tensor]
    """Weights, optimizer state and average, by `part/parameter`."""
    seen: list[tuple[tuple[int, ...], tuple[str, ...]]]
    """Positions and sample keys of every batch that was trained on."""


class PowerCut(Exception):  # noqa: N818 - it is an event
    """Ends a life without a word: nothing is saved."""


def live(config: RunConfig, *, stop_after: int | None = None, before: Callable[[Trainer], Any] | None = None) -> Life:
    """Start or resume a run in this process. `before` may meddle with the trainer; PowerCut counts as not finished."""
    seen: list[tuple[tuple[int, ...], tuple[str, ...]]] = []
    deliver = StreamingLoader.__next__

    def watched(loader: StreamingLoader) -> Any:
        batch = deliver(loader)
        seen.append((tuple(batch.position.tolist()), batch.keys))
        return batch

    StreamingLoader.__next__ = watched  # type: ignore[method-assign]
    here = start("cpu")
    try:
        with StopRequest() as stop:
            trainer = build_trainer(config, here, stop_after=stop_after)
            if before is not None:
                before(trainer)
            try:
                finished = trainer.run(stop)
            except PowerCut:
                finished = False
            finally:
                trainer.close()
        tensors = {name: whole(t).clone() for name, t in trainer.state.tensors().items()}
        return Life(finished=finished, step=trainer.state.step, tensors=tensors, seen=seen)
    finally:
        StreamingLoader.__next__ = deliver  # type: ignore[method-assign]
        here.shutdown()


def cut_power(after: int) -> Callable[[Trainer], None]:
    """For `live(before=...)`: the life ends in the log call of step `after`, before anything of that step is saved."""

    def meddle(trainer: Trainer) -> None:
        log = trainer.sinks.log

        def cut(step: int, record: Any) -> None:
            log(step, record)
            if step == after:
                raise PowerCut

        trainer.sinks.log = cut  # type: ignore[method-assign]

    return meddle


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, torch.distributed.tensor.DTensor) else t


def records(run: Path | str) -> list[dict[str, Any]]:
    """metrics.jsonl, as it lies there: a cut line would fail here."""
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


def steady(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records without what measures the machine."""
    return [{k: v for k, v in line.items() if not k.startswith(VOLATILE)} for line in lines]


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Bitwise, and nothing missing."""
    assert a.keys() == b.keys()
    different = [name for name in a if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])]
    assert not different, f"{len(different)} of {len(a)} tensors differ: {different[:5]}"

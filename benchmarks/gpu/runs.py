"""Whole runs, by the loop that trains: it never waits for the device, and it learns what a CPU learns."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

from data_pipeline.shapes.make import make_shapes
from ecdit_train.build import build_trainer
from ecdit_train.config.compose import compose
from ecdit_train.parallel.runtime import start
from ecdit_train.run_folder import METRICS_FILE
from ecdit_train.supervise.stop import StopRequest
from ecdit_train.train.trainer import Trainer

from .device import Device
from .rank import SMALL
from .record import Findings

QUIET = (
    "observe/sinks=none",
    "observe.sample_every=0",
    "checkpoint.every_steps=100000",
    "parallel.ep=1",
    "checkpoint.save=blocking",
)
FIRST, LAST = 4, 9
"""Steps between whose fetches nothing may wait: allocations and library handles of the first ones may."""


def waits(device: Device, found: Findings) -> None:
    """Waits for the device in steps of the real loop: bf16 (so FSDP and, on a GPU, NCCL with one rank), RMSProp with its moving
    average, the loader with its threads; eager, and compiled."""
    forms: dict[str, tuple[str, ...]] = {"eager": ()}
    forms |= device.choose(cuda={"compiled": ("parallel.compile=true",)}, cpu={})
    for name, words in forms.items():
        with found.part(name):
            places = steps_without_log(device, "optim/optimizer=rmsprop", *words)
            found.values[name] = dict(places)
            found.at_most(f"{name}: waits for the device per step", sum(places.values()) / (LAST - FIRST), 0)


def steps_without_log(device: Device, *words: str) -> Counter[str]:
    """Where steps FIRST to LAST of a run waited."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        counts: list[Counter[str]] = []
        fetches = [0]

        def meddle(trainer: Trainer) -> None:
            fetch, inner = trainer.batches.fetch, contextlib.ExitStack()

            def counted() -> Any:
                fetches[0] += 1
                if fetches[0] == FIRST:
                    counts.append(inner.enter_context(device.waits()))
                if fetches[0] == LAST:
                    inner.close()
                return fetch()

            trainer.batches.fetch = counted  # type: ignore[method-assign]

        with device.compiling():
            live(device, folder, (*SMALL, "train.steps=12", "observe.log_every=1000", *words), before=meddle)
        assert fetches[0] > LAST, "the run ended before the steps that were to be watched"
        return counts[0]


def demo(device: Device, found: Findings) -> None:
    """The demo's network for 200 steps in fp32, on the CPU and on the device: the same losses at first, and as good in the end.
    (Rounding grows by what routing decides, so later steps are compared by their mean.)"""
    size = device.choose(cuda=("train.steps=200",), cpu=(*SMALL, "train.steps=8", "train.precision=fp32"))
    losses = {}
    for kind in ("cpu", device.kind):
        with tempfile.TemporaryDirectory() as folder:
            losses[f"{len(losses)} {kind}"] = live(Device(kind=kind), Path(folder), (*size, "observe.log_every=1"))
    one, two = losses.values()
    assert len(one) == len(two) > 4, "the runs do not have the same steps"
    tenth = len(one) // 10 or 1
    early = max(abs(a - b) / a for a, b in zip(one[:tenth], two[:tenth], strict=True))
    late = abs(mean(one[-tenth:]) - mean(two[-tenth:])) / mean(one[-tenth:])
    found.values |= {"losses": losses, "early": early, "late": late}
    found.at_most(f"demo: loss of the first {tenth} steps, relative to a CPU", early, 1e-3)
    found.at_most(f"demo: mean loss of the last {tenth} steps, relative to a CPU", late, 2e-2)


def live(
    device: Device, folder: Path, words: tuple[str, ...], *, before: Callable[[Trainer], None] = lambda _: None
) -> list[float]:
    """A run in this process from start to end; its losses by step."""
    shards = folder / "shards"
    resolution = next((int(w.partition("=")[2]) for w in words if w.startswith("data.resolution=")), 24)
    make_shapes(shards, count=400, resolution=resolution, seed=3, samples_per_shard=100)
    run = folder / "run"
    config = compose(["experiment=shapes_tiny", f"run={run}", f"data.shards={shards}", *words, *QUIET], local=False)
    here = start(device.kind, env={})
    try:
        with StopRequest() as stop:
            trainer = build_trainer(config, here)
            before(trainer)
            try:
                trainer.run(stop)
            finally:
                trainer.close()
    finally:
        here.shutdown()
    path = run / METRICS_FILE
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line["train/loss"] for line in lines if "train/loss" in line]

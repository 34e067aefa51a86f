"""Whole steps of one rank of a preset: time against the model's FLOPs, memory against the plan, and the
graphs that training compiles."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ecdit_train.config.schema import RunConfig
from ecdit_train.plan import parameters
from ecdit_train.plan.cost import cost
from ecdit_train.plan.layout import resolve

from ..training import Training, microbatch
from .device import Device
from .rank import fake_world, presets, rank_zero
from .record import Findings

MOST_GRAPHS = 4
"""A dense block, what is before and after a sparse layer, and the experts: for a network of any depth."""
MEMORY = 0.10
"""The plan's promise."""


def steps(device: Device, found: Findings) -> None:
    """Seconds and bytes of a step as the preset is configured, and of the same without recomputation and
    compilation where it fits."""
    for preset in presets(device):
        with found.part(preset.name):
            with fake_world(preset.world):
                found.values[preset.name] = row = measure(preset.config(), device, world=preset.world)
            if device.cuda:
                found.at_least(f"{preset.name}: MFU / the plan's without communication", row["mfu / plan"], 0.9)
                found.at_most(f"{preset.name}: memory off the plan", abs(row["memory / plan"] - 1), MEMORY)


def measure(config: RunConfig, device: Device, *, world: int) -> dict[str, float]:
    """Inside of a fake world. Frozen encoders and batches that are prepared are left out, of the plan's figures as well."""
    planned = cost(config, parameters.count(config), resolve(config, world=world))
    memory, time = planned.memory, planned.step_time
    device.forget_peak()
    step = make_step(config, device, world=world)
    step()
    seconds = device.seconds({"step": step}, rounds=device.choose(cuda=3, cpu=1))["step"]
    peak = device.peak_bytes()
    share = config.cluster.peak_flops * world
    mfu = planned.flops.model / share / seconds
    products = time.products * (1 - planned.flops.frozen_encoders / planned.flops.total)
    work = products + time.elementwise + time.casts + time.optimizer
    expected = memory.total - memory.framework - memory.encoders - memory.prepared_batches
    return {
        "seconds": seconds,
        "mfu": mfu,
        "mfu / plan": mfu / (planned.flops.model / share / work),
        "planned_bytes": expected,
        "peak_bytes": float(peak or 0),
        "memory / plan": (peak or 0) / expected,
    }


def make_step(config: RunConfig, device: Device, *, world: int) -> Callable[[], None]:
    """What a run makes of a batch that is there already, the guard included; the host does not wait for the device."""
    with device.compiling():
        training = Training(config, rank_zero(device, world=world), lr=config.optim.lr)
    size = config.train.microbatch
    images = config.train.global_batch // training.parallel.mesh.dp_size

    def step() -> None:
        first = training.state.step * images
        training.step([microbatch(config, first=n, device=device.kind) for n in range(first, first + images, size)])

    return step


def graphs(device: Device, found: Findings) -> None:
    """Graphs and recompilations on the path that training uses (parallel.compile): none after the first step, though
    masks, timesteps and captions change in each."""
    from torch._dynamo.utils import counters

    preset = presets(device)[0]
    config = preset.config("parallel.compile=true")
    torch._dynamo.reset()
    counters.clear()
    with fake_world(preset.world):
        step = make_step(config, device, world=preset.world)
        step()
        first = counters["stats"]["unique_graphs"]
        for _ in range(3):
            step()
    later = counters["stats"]["unique_graphs"] - first
    broken = sum(counters["graph_break"].values())
    found.values |= {"graphs": first, "later": later, "graph_breaks": broken, "why": dict(counters["graph_break"])}
    found.at_least("graphs that training compiled", first, 1)
    found.at_most("graphs for a network of any depth", first, MOST_GRAPHS)
    found.at_most("graphs after the first step", later, 0)

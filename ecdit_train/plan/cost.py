"""What a layout costs: FLOPs, memory, traffic, and the seconds of one optimizer step.

The seconds are an estimate between two bounds, from the rates that the cluster file states:

    matrix products   executed FLOPs / (world * peak * gemm_efficiency)
    element-wise      180 d bytes per token and layer at memory bandwidth for norms, GELU, residuals, gates, gather and
                      scatter when compiled; 2.5 times that in eager mode; a third more when the forward is repeated
    optimizer         state read and written once, and its matrix products on the busiest rank; what it sends is never hidden
    expert exchange   hidden behind the experts' own products as far as `overlap_chunks` = k allows:
                      min(1, products / exchange) (k - 1) / k
    weights           all-gathers and reductions of FSDP hide behind products and element-wise work of other blocks;
                      what is longer than that is exposed
    tensor parallel   never hidden

`best` hides all communication, `worst` hides none. The constants are a model of an H100, not measurements.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from ecdit_train.config.schema import RunConfig

from . import flops as flops_
from . import memory as memory_
from . import traffic
from .flops import Flops
from .layout import Layout
from .memory import GRADIENT, MASTER, Memory
from .parameters import Parameters
from .traffic import Flow

ELEMENTWISE_BYTES = 180
"""Bytes moved per token, layer and unit of width, forward and backward, compiled bf16 (estimate of performance.md)."""
EAGER_FACTOR = 2.5


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one optimizer step."""

    seconds: float
    best: float
    worst: float
    products: float
    elementwise: float
    optimizer: float
    optimizer_exchange: float
    exchange: float
    exchange_exposed: float
    weights: float
    weights_exposed: float
    tensor_parallel: float
    mfu: float
    """Model FLOPs over peak at `seconds`; recomputation does not count as useful."""
    mfu_ceiling: float
    """The same at `best`."""
    tokens_per_second: float
    images_per_second_per_gpu: float


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one layout costs."""

    layout: Layout
    flops: Flops
    memory: Memory
    traffic: tuple[Flow, ...]
    optimizer_flops: float
    """Of the update's matrix products, on the busiest rank."""
    step_time: StepTime
    fits: bool


def cost(cfg: RunConfig, parameters: Parameters, layout: Layout) -> Cost:
    """Pure arithmetic; microseconds. Of several stages the slowest, with the largest memory of any: what a layout must bear."""
    stages = [of_stage(stage, parameters, layout) for _, stage in cfg.stages()]
    memory = max((stage.memory for stage in stages), key=lambda m: m.total)
    slowest = max(stages, key=lambda stage: stage.step_time.seconds)
    return dataclasses.replace(slowest, memory=memory, fits=all(stage.fits for stage in stages))


def of_stage(cfg: RunConfig, parameters: Parameters, layout: Layout) -> Cost:
    """What `layout` costs a run of one stage."""
    flops = flops_.of_layout(cfg, layout)
    memory = memory_.estimate(cfg, parameters, layout)
    flows = traffic.per_step(cfg, parameters, layout)
    products = traffic.update(cfg, parameters, layout).flops
    return Cost(
        layout=layout,
        flops=flops,
        memory=memory,
        traffic=flows,
        optimizer_flops=products,
        step_time=step_time(cfg, layout, flops=flops, memory=memory, flows=flows, optimizer_flops=products),
        fits=memory.total <= cfg.cluster.gpu_memory,
    )


def step_time(
    cfg: RunConfig, layout: Layout, *, flops: Flops, memory: Memory, flows: Iterable[Flow], optimizer_flops: float
) -> StepTime:
    """Step time of `layout`; every argument describes one step."""
    cluster, world, d = cfg.cluster, layout.world, cfg.model.width
    rate = world * cluster.peak_flops * cluster.gemm_efficiency
    products = flops.total / rate
    tokens = cfg.train.global_batch * cfg.tokens_per_image / layout.dp
    repeated = 1.0 if layout.activation_checkpointing == "none" else 4 / 3
    eager = 1.0 if cfg.parallel.compile else EAGER_FACTOR
    elementwise = ELEMENTWISE_BYTES * d * tokens * cfg.model.layers * repeated * eager / cluster.memory_bandwidth
    # Gradients are read; weights, optimizer state and average are read and written.
    moved = GRADIENT / MASTER * memory.parameters + 2 * (memory.parameters + memory.optimizer + memory.ema)
    optimizer = moved / cluster.memory_bandwidth + world * optimizer_flops / rate

    seconds = dict.fromkeys(("ep", "tp", "world", "weights"), 0.0)
    for flow in flows:
        axis = flow.axis if flow.axis in seconds else "weights"
        seconds[axis] += flow.seconds(intra_bandwidth=cluster.intra_bandwidth, inter_bandwidth=cluster.inter_bandwidth)
    exchange, chunks = seconds["ep"], layout.overlap_chunks
    experts = flops.by_part["experts"] / rate
    hidden = min(1.0, experts / exchange) * (chunks - 1) / chunks if exchange else 0.0
    exchange_exposed = exchange * (1 - hidden)
    work = products + elementwise
    weights_exposed = max(0.0, seconds["weights"] - work)
    update = optimizer + seconds["world"]
    total = work + update + exchange_exposed + seconds["tp"] + weights_exposed
    best = max(work + update, exchange, seconds["weights"])
    worst = work + update + exchange + seconds["tp"] + seconds["weights"]

    def mfu(step: float) -> float:
        return flops.model / (world * cluster.peak_flops * step)

    images = cfg.train.global_batch
    return StepTime(
        seconds=total,
        best=best,
        worst=worst,
        products=products,
        elementwise=elementwise,
        optimizer=optimizer,
        optimizer_exchange=seconds["world"],
        exchange=exchange,
        exchange_exposed=exchange_exposed,
        weights=seconds["weights"],
        weights_exposed=weights_exposed,
        tensor_parallel=seconds["tp"],
        mfu=mfu(total),
        mfu_ceiling=mfu(best),
        tokens_per_second=images * cfg.tokens_per_image / total,
        images_per_second_per_gpu=images / total / world,
    )

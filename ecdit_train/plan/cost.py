"""What a layout costs: FLOPs, memory, traffic, and the seconds of one optimizer step.

The seconds are an estimate between two bounds, from the rates that the cluster file states:

    matrix products   executed FLOPs / (world * peak * gemm_efficiency)
                      those of 8-bit operands at `peak_fp8_flops`, where the cluster has it; MFU stays stated against `peak_flops`
    casts             of operands to 8 bits and what surrounds the products (plan/low_precision.py), at memory bandwidth
    element-wise      180 d bytes per token and layer at memory bandwidth for norms, GELU, residuals, gates, gather and
                      scatter when compiled; 2.5 times that in eager mode; a third more where the forward is repeated; the lean
                      form moves 8 values of width d more a row (6 where an exchange brings rows): the row is gathered again and
                      multiplied by its gate, activations are written again, results are not weighed in backward; a hierarchical
                      exchange rearranges rows twice
    copies            what FSDP moves in memory, per gathered element of the compute type's c bytes: shards to c bytes (4 + c) and
                      out of the gather's buffer (2 c); gradients into the reduction's (c + 4); while whole gradients add up, c + 8
    optimizer         state read and written once, and its matrix products on the busiest rank; what it sends is never hidden
    expert exchange   hidden behind the experts' own products as far as `overlap_chunks` = k allows:
                      min(1, products / exchange) (k - 1) / k
    weights           all-gathers and reductions of FSDP hide behind products and element-wise work of other blocks, less what
                      hides an exchange already; what is longer than that is exposed
    tensor parallel   never hidden

A collective takes the longer of its two links' times and the latency of its calls (traffic.py: hops, `cluster.*_latency`).

`best` hides all communication, `worst` hides none. The constants are a model of an H100, not measurements.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from ecdit_train.config.schema import RunConfig

from . import flops as flops_
from . import low_precision, slots, traffic
from . import memory as memory_
from .flops import Flops
from .layout import Layout, blocks_again, element_bytes, units
from .memory import GRADIENT, MASTER, Memory
from .parameters import Parameters
from .traffic import Flow

ELEMENTWISE_BYTES = 180
"""Bytes moved per token, layer and unit of width, forward and backward, compiled bf16 (estimate of performance.md)."""
EAGER_FACTOR = 2.5

LEAN_VALUES = 2
"""Values of width d that the lean form moves more for a row than the plain one, where rows are gathered again. Where an exchange
brought them it keeps them, and what it makes again is what it saves by gates without a pass of their own (counted op by op)."""
HIERARCHICAL_VALUES = 4
"""Those that a hierarchical exchange moves more each of the four times that a row travels: two rearrangements, read and written."""


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one optimizer step."""

    seconds: float
    best: float
    worst: float
    products: float
    elementwise: float
    casts: float
    """Of operands to 8 bits; 0 but with fp8."""
    copies: float
    optimizer: float
    optimizer_exchange: float
    exchange: float
    exchange_exposed: float
    weights: float
    weights_exposed: float
    tensor_parallel: float
    latency: float
    """Of what collectives take, hidden or not: what their number costs, whatever their size."""
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


def at_least(cfg: RunConfig, parameters: Parameters, layout: Layout) -> float:
    """Seconds of a step of `layout` whose optimizer needs no others: cheaper to know than `cost` where it does."""
    return max(
        step_time(
            stage,
            layout,
            flops=flops_.of_layout(stage, layout),
            memory=memory_.estimate(stage, parameters, layout),
            flows=traffic.before_update(stage, parameters, layout),
            optimizer_flops=0.0,
            copied=copied(stage, parameters, layout),
        ).seconds
        for _, stage in cfg.stages()
    )


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
        step_time=step_time(
            cfg,
            layout,
            flops=flops,
            memory=memory,
            flows=flows,
            optimizer_flops=products,
            copied=copied(cfg, parameters, layout),
        ),
        fits=memory.total <= cfg.cluster.gpu_memory,
    )


def copied(cfg: RunConfig, parameters: Parameters, layout: Layout) -> float:
    """Bytes that FSDP reads and writes in this rank's memory to gather weights and reduce gradients in a step."""
    total = 0.0
    for unit in units(cfg, parameters, layout):
        c, alone = unit.bytes_each, unit.shards == 1
        gather = (MASTER + c) / unit.shards + (0 if alone else 2 * c)
        each = (1 + unit.freed) * layout.microbatches * gather
        each += layout.reductions * (c + GRADIENT)
        each += layout.microbatches * (c + 2 * GRADIENT) if layout.accumulates_whole else 0.0
        total += unit.count * unit.gathered * each
    return total


def elementwise_bytes(cfg: RunConfig, layout: Layout) -> float:
    """What a rank moves in its memory for everything that is no matrix product, in a step."""
    tokens, d, sparse = (
        cfg.train.global_batch * cfg.tokens_per_image / layout.dp,
        cfg.model.width,
        slots.sparse_blocks(cfg),
    )
    again = sum(blocks_again(count, layout) for count in (sparse, cfg.model.layers - sparse))
    eager = 1.0 if cfg.parallel.compile else EAGER_FACTOR
    moved = ELEMENTWISE_BYTES * d * tokens * (cfg.model.layers + again / 3) * eager
    rows = d * element_bytes(cfg) * slots.experts_per_token(cfg) * tokens * sparse / layout.tp
    if layout.form == "lean" and layout.ep == 1:
        moved += LEAN_VALUES * rows
    if layout.exchange == "hierarchical":
        moved += 4 * HIERARCHICAL_VALUES * rows
    return moved


def products_seconds(cfg: RunConfig, layout: Layout, *, flops: float, in_8_bits: float) -> float:
    """Seconds that all ranks together take for `flops`, of which `in_8_bits` have 8-bit operands."""
    rate = layout.world * cfg.cluster.peak_flops * cfg.cluster.gemm_efficiency
    return (flops - in_8_bits * (1 - 1 / low_precision.rate(cfg))) / rate


def moved_seconds(cfg: RunConfig, layout: Layout) -> float:
    """Seconds of what is no matrix product, casts included."""
    return (elementwise_bytes(cfg, layout) + low_precision.cast_bytes(cfg, layout)) / cfg.cluster.memory_bandwidth


def exchange_cost(cfg: RunConfig, layout: Layout) -> float:
    """Seconds that the experts' exchange adds to a step under `layout`, as `step_time` has it."""
    flows, cluster = traffic.experts(cfg, layout), cfg.cluster
    exchange = sum(flow.takes(cluster) for flow in flows if flow.ranks > 1)
    experts = _experts_seconds(cfg, layout, flops_.per_step(cfg, checkpointing="none"))
    exposed = _exposed(exchange, experts=experts, chunks=layout.overlap_chunks)
    return exposed + moved_seconds(cfg, layout)


def _experts_seconds(cfg: RunConfig, layout: Layout, flops: Flops) -> float:
    of_experts = flops.by_part["experts"]
    return products_seconds(cfg, layout, flops=of_experts, in_8_bits=of_experts if cfg.train.recipe else 0.0)


def _exposed(exchange: float, *, experts: float, chunks: int) -> float:
    """Of the exchange's seconds, those that no other part's products hide."""
    return exchange * (1 - min(1.0, experts / exchange) * (chunks - 1) / chunks) if exchange else 0.0


def step_time(
    cfg: RunConfig,
    layout: Layout,
    *,
    flops: Flops,
    memory: Memory,
    flows: Iterable[Flow],
    optimizer_flops: float,
    copied: float,
) -> StepTime:
    """Step time of `layout`; every argument describes one step."""
    cluster, world = cfg.cluster, layout.world
    rate = world * cluster.peak_flops * cluster.gemm_efficiency
    low = flops.in_8_bits + flops.recompute_in_8_bits
    products = products_seconds(cfg, layout, flops=flops.total, in_8_bits=low)
    casts = low_precision.cast_bytes(cfg, layout) / cluster.memory_bandwidth
    elementwise = elementwise_bytes(cfg, layout) / cluster.memory_bandwidth
    copies = copied / cluster.memory_bandwidth
    # Gradients are read; weights, optimizer state and average are read and written.
    moved = GRADIENT / MASTER * memory.parameters + 2 * (memory.parameters + memory.optimizer + memory.ema)
    optimizer = moved / cluster.memory_bandwidth + world * optimizer_flops / rate

    seconds, latency = dict.fromkeys(("ep", "tp", "world", "weights"), 0.0), 0.0
    for flow in flows:
        seconds[flow.axis if flow.axis in seconds else "weights"] += flow.takes(cluster)
        latency += flow.latency(cluster)
    exchange, chunks = seconds["ep"], layout.overlap_chunks
    exchange_exposed = _exposed(exchange, experts=_experts_seconds(cfg, layout, flops), chunks=chunks)
    work = products + elementwise + casts + copies
    # What hides one thing cannot hide another: both use the same links.
    weights_exposed = max(0.0, seconds["weights"] - max(0.0, work - (exchange - exchange_exposed)))
    update = optimizer + seconds["world"]
    total = work + update + exchange_exposed + seconds["tp"] + weights_exposed
    best = max(work + update, exchange + seconds["weights"])
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
        casts=casts,
        copies=copies,
        optimizer=optimizer,
        optimizer_exchange=seconds["world"],
        exchange=exchange,
        exchange_exposed=exchange_exposed,
        weights=seconds["weights"],
        weights_exposed=weights_exposed,
        tensor_parallel=seconds["tp"],
        latency=latency,
        mfu=mfu(total),
        mfu_ceiling=mfu(best),
        tokens_per_second=images * cfg.tokens_per_image / total,
        images_per_second_per_gpu=images / total / world,
    )

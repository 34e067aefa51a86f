"""Search for a layout: every (tp, ep, replicas, checkpointing, microbatch, chunks) that divides, priced
by the same formulas."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from itertools import product

from ecdit_train.config.nearest import divisors
from ecdit_train.config.schema import RunConfig
from ecdit_train.config.validate import validate
from ecdit_train.errors import ConfigError

from . import memory, slots
from .cost import Cost, cost
from .layout import Layout, resolve
from .memory import GRADIENT, MASTER
from .parameters import Parameters

MAX_NODES = 512
HEADROOM = 0.92
"""A suggestion fills at most this share of the memory: estimates are 10 % accurate and allocators fragment."""


def best(cfg: RunConfig, parameters: Parameters, *, world: int) -> Cost | None:
    """The fastest layout that fits with headroom on `world` ranks; of equally fast ones the simplest.
    None if none fits."""
    priced = (
        cost(cfg, parameters, layout) for layout in candidates(cfg, world=world) if _has_room(cfg, parameters, layout)
    )
    for found in sorted(priced, key=lambda c: (round(c.step_time.seconds, 4), *_complexity(c))):
        if _is_valid(cfg, found.layout):
            return found
    return None


def min_nodes(cfg: RunConfig, parameters: Parameters) -> int | None:
    """Fewest nodes on which the layout fits as configured; its dp_shard follows the number of ranks."""
    flexible = dataclasses.replace(cfg, parallel=dataclasses.replace(cfg.parallel, dp_shard=-1))
    for nodes in range(1, MAX_NODES + 1):
        if cfg.train.global_batch % (nodes * cfg.cluster.gpus_per_node // cfg.parallel.tp or 1):
            continue
        try:
            layout = resolve(flexible, world=nodes * cfg.cluster.gpus_per_node)
        except ConfigError:
            continue
        if cost(cfg, parameters, layout).fits:
            return nodes
    return None


def min_nodes_any(cfg: RunConfig, parameters: Parameters) -> int | None:
    """Fewest nodes on which some layout fits with headroom."""
    state = float(MASTER + GRADIENT) * parameters.network + parameters.state_bytes
    for nodes in range(1, MAX_NODES + 1):
        world = nodes * cfg.cluster.gpus_per_node
        if state / world > cfg.cluster.gpu_memory:
            continue
        for layout in candidates(cfg, world=world, modes=("full",)):
            if _has_room(cfg, parameters, layout) and _is_valid(cfg, layout):
                return nodes
    return None


def candidates(
    cfg: RunConfig, *, world: int, modes: tuple[str, ...] = ("none", "selective", "full")
) -> Iterator[Layout]:
    """Layouts that divide. Tensor parallelism stays inside a node; replicas are whole nodes."""
    gpus, batch, images = cfg.cluster.gpus_per_node, cfg.train.global_batch, cfg.images_per_group
    experts = math.gcd(slots.num_experts(cfg), world) if slots.sparse_blocks(cfg) else 1
    for tp in (n for n in divisors(math.gcd(cfg.model.heads, world)) if n <= gpus):
        dp = world // tp
        if batch % dp or (batch // dp) % images:
            continue
        micros = [n for n in divisors(batch // dp) if n % images == 0 and n <= 512 and _same_router(cfg, dp, n, world)]
        replicas = [n for n in divisors(dp) if n == 1 or ((world // n) % gpus == 0 and n <= 8)]
        for ep, copies, micro, chunks, mode in product(divisors(experts), replicas, micros, (1, 2), modes):
            if chunks > 1 and ep == 1:
                continue
            yield Layout(
                world=world,
                gpus_per_node=gpus,
                dp_replicate=copies,
                dp_shard=dp // copies,
                tp=tp,
                ep=ep,
                activation_checkpointing=mode,
                overlap_chunks=chunks,
                reshard_after_forward="all",
                microbatch=micro,
                microbatches=batch // (dp * micro),
            )


def _same_router(cfg: RunConfig, dp: int, microbatch: int, world: int) -> bool:
    """Where a microbatch is what competes, another one is another network and no layout."""
    configured = cfg.train.microbatch
    if cfg.moe.router is None:
        return True
    if cfg.moe.router.whole_batch:
        return dp * microbatch == world // cfg.parallel.tp * configured
    return cfg.moe.scope != "batch" or microbatch == configured


def with_layout(cfg: RunConfig, layout: Layout) -> RunConfig:
    """`cfg` with the values of `layout`."""
    shared = {f.name for f in dataclasses.fields(cfg.parallel)} & {f.name for f in dataclasses.fields(layout)}
    parallel = dataclasses.replace(cfg.parallel, **{name: getattr(layout, name) for name in shared})
    train = dataclasses.replace(cfg.train, microbatch=layout.microbatch)
    return dataclasses.replace(cfg, parallel=parallel, train=train)


def overrides(layout: Layout) -> tuple[str, ...]:
    """What chooses `layout` on the command line."""
    return (
        f"parallel.tp={layout.tp}",
        f"parallel.ep={layout.ep}",
        f"parallel.dp_replicate={layout.dp_replicate}",
        "parallel.dp_shard=-1",
        f"parallel.activation_checkpointing={layout.activation_checkpointing}",
        f"parallel.overlap_chunks={layout.overlap_chunks}",
        f"train.microbatch={layout.microbatch}",
    )


def _has_room(cfg: RunConfig, parameters: Parameters, layout: Layout) -> bool:
    return memory.estimate(cfg, parameters, layout).total <= HEADROOM * cfg.cluster.gpu_memory


def _complexity(c: Cost) -> tuple[float, ...]:
    """Fewer axes first, then the larger microbatch (fewer gathers)."""
    at = c.layout
    return (at.tp, at.dp_replicate, at.overlap_chunks, at.ep, -at.microbatch, c.memory.total)


def _is_valid(cfg: RunConfig, layout: Layout) -> bool:
    try:
        validate(with_layout(cfg, layout), world=layout.world)
    except ConfigError:
        return False
    return True

"""Search for a layout, priced by the formulas of the plan.

A place is what cannot be had by halves: (tp, ep, copies, microbatch). Each has a bound, its time if memory were no object, and
places are looked at by it until no bound is below what was found. Within a place the choices that only cost memory (which weights
stay gathered, when gradients are reduced, the form of sparse layers, what is computed again) are tried from the fastest on, and
the first that fits is priced: a few thousand formulas for hundreds of thousands of layouts.

Of layouts that are as fast, within what the formulas could tell apart, the one that computes least again is
taken, then the simplest.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

from ecdit_train.config.nearest import divisors
from ecdit_train.config.schema import RunConfig
from ecdit_train.config.validate import validate
from ecdit_train.errors import ConfigError

from . import memory, policies, slots
from .cost import Cost, at_least, cost, exchange_cost
from .layout import CHOSEN, Layout, resolve
from .memory import GRADIENT, MASTER
from .parameters import Parameters
from .policies import ALL_AGAIN, Policy

MAX_NODES = 512
HEADROOM = 0.92
"""A suggestion fills at most this share of the memory: estimates are 10 % accurate and allocators fragment."""
TIE = 0.01
"""Relative difference of time below which two layouts are as fast."""
CHUNKS = (1, 2, 4)
FREED = ("none", "experts", "dense", "all")


def best(cfg: RunConfig, parameters: Parameters, *, world: int) -> Cost | None:
    """The fastest layout that fits with headroom on `world` ranks; of equally fast ones that with the least work, then the
    simplest. None if none fits."""
    bounds = sorted(
        ((_bound(cfg, parameters, forms), number, forms) for number, forms in enumerate(places(cfg, world=world))),
        key=lambda item: item[:2],
    )
    found: list[Cost] = []
    fastest, worth = math.inf, _Worth(cfg)
    for bound, _, forms in bounds:
        if bound > fastest * (1 + TIE):
            break
        if _has_room(cfg, parameters, _least(forms)) and _is_valid(cfg, forms[0]):
            found += _within(cfg, parameters, forms, worth, within=fastest * (1 + TIE))
            fastest = min((one.step_time.seconds for one in found), default=math.inf)
    as_fast = [one for one in found if one.step_time.seconds <= fastest * (1 + TIE)]
    as_fast.sort(key=lambda one: (round(one.flops.recompute / one.flops.model, 2), *_complexity(cfg, one)))
    return next((one for one in as_fast if _is_valid(cfg, one.layout)), None)


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
        if memory.estimate(cfg, parameters, layout).total <= cfg.cluster.gpu_memory:
            return nodes
    return None


def min_nodes_any(cfg: RunConfig, parameters: Parameters) -> int | None:
    """Fewest nodes on which some layout fits with headroom: of each place the way that needs least memory is asked."""
    state = float(MASTER + GRADIENT) * parameters.network + parameters.state_bytes
    for nodes in range(1, MAX_NODES + 1):
        world = nodes * cfg.cluster.gpus_per_node
        if state / world > cfg.cluster.gpu_memory:
            continue
        for forms in places(cfg, world=world):
            least = _least(forms)
            if _has_room(cfg, parameters, least) and _is_valid(cfg, least):
                return nodes
    return None


def places(cfg: RunConfig, *, world: int) -> Iterator[tuple[Layout, ...]]:
    """Layouts that divide, each in every form of the sparse layers (the last with the least memory), with the exchange that takes
    least time. Tensor parallelism stays inside a node; copies are whole nodes."""
    gpus, batch, images = cfg.cluster.gpus_per_node, cfg.train.global_batch, cfg.images_per_group
    experts = math.gcd(slots.num_experts(cfg), world) if slots.sparse_blocks(cfg) else 1
    for tp in (n for n in divisors(math.gcd(cfg.model.heads, world)) if n <= gpus):
        dp = world // tp
        if batch % dp or (batch // dp) % images:
            continue
        micros = [n for n in divisors(batch // dp) if n % images == 0 and n <= 512 and _same_router(cfg, dp, n, world)]
        copies = [n for n in divisors(dp) if n == 1 or ((world // n) % gpus == 0 and n <= 8)]
        for ep, replicas, micro in product(divisors(experts), copies, micros):
            of_experts = [1, replicas] if experts > 1 and replicas > 1 and world // ep % replicas == 0 else [1]
            for expert_copies in of_experts:
                plain = Layout(
                    world=world,
                    gpus_per_node=gpus,
                    dp_replicate=replicas,
                    dp_shard=dp // replicas,
                    tp=tp,
                    ep=ep,
                    edp_replicate=expert_copies,
                    activation_checkpointing="none",
                    overlap_chunks=1,
                    reshard_after_forward="all",
                    microbatch=micro,
                    microbatches=batch // (dp * micro),
                )
                yield tuple(_exchanged(cfg, dataclasses.replace(plain, form=form)) for form in slots.forms(cfg))


def _exchanged(cfg: RunConfig, layout: Layout) -> Layout:
    """`layout` with the chunks and the way of the exchange that expose least of it."""
    if layout.ep == 1:
        return layout
    groups = layout.microbatch * cfg.tokens_per_image // cfg.group_tokens
    fixed, gpus = slots.rows_are_fixed(cfg), layout.gpus_per_node
    chunks = [n for n in CHUNKS if groups % n == 0] if fixed else [1]
    ways = ("flat", "hierarchical")[: 1 + (fixed and layout.ep > gpus > 1 and layout.ep % gpus == 0)]
    every = [dataclasses.replace(layout, overlap_chunks=n, exchange=way) for way in ways for n in chunks]
    return min(every, key=lambda at: exchange_cost(cfg, at))


def _bound(cfg: RunConfig, parameters: Parameters, forms: Sequence[Layout]) -> float:
    """Seconds of a place if memory were no object."""
    free = dataclasses.replace(forms[0], reshard_after_forward="none")
    return min(at_least(cfg, parameters, at) for at in _reduced(cfg, free))


def _least(forms: Sequence[Layout]) -> Layout:
    """Of a place, what needs least memory."""
    return dataclasses.replace(ALL_AGAIN.of(forms[-1]), reduce_gradients="microbatch")


def _reduced(cfg: RunConfig, layout: Layout) -> list[Layout]:
    """`layout` with either way to reduce gradients, where they differ."""
    ways = ("step", "microbatch") if layout.microbatches > 1 else (cfg.parallel.reduce_gradients,)
    return [dataclasses.replace(layout, reduce_gradients=way) for way in ways]


def _within(
    cfg: RunConfig, parameters: Parameters, forms: Sequence[Layout], worth: _Worth, *, within: float
) -> Iterator[Cost]:
    """Of a place, for every choice of the rest, what computes least again and fits; what takes longer than `within` is left out."""
    for form in forms:
        freed = FREED if slots.sparse_blocks(cfg) else ("none", "all")
        for at, parts in product(_reduced(cfg, form), freed):
            chosen = dataclasses.replace(at, reshard_after_forward=parts)
            every = [policy.of(chosen) for policy in worth.of(chosen)]
            if not _has_room(cfg, parameters, every[-1]):
                continue
            first = next((one for one in every if _has_room(cfg, parameters, one)), None)
            if first is not None and at_least(cfg, parameters, first) <= within:
                yield cost(cfg, parameters, first)


class _Worth:
    """Policies that are worth trying; they are the same for all sizes of a microbatch."""

    def __init__(self, cfg: RunConfig) -> None:
        self._cfg = cfg
        self._known: dict[tuple[object, ...], tuple[Policy, ...]] = {}

    def of(self, layout: Layout) -> tuple[Policy, ...]:
        key = (layout.tp, layout.ep, layout.form, layout.exchange)
        if key not in self._known:
            self._known[key] = policies.worthwhile(self._cfg, layout)
        return self._known[key]


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
    values: dict[str, Any] = {name: getattr(layout, name) for name in shared} | {
        "replicate_experts": layout.replicate_experts
    }
    parallel = dataclasses.replace(cfg.parallel, **values)
    train = dataclasses.replace(cfg.train, microbatch=layout.microbatch)
    values = {"form": layout.form} if slots.rows_are_fixed(cfg) else {}
    return dataclasses.replace(cfg, parallel=parallel, train=train, moe=dataclasses.replace(cfg.moe, **values))


def overrides(cfg: RunConfig, layout: Layout) -> tuple[str, ...]:
    """What chooses `layout` on the command line, beside what `cfg` says already."""
    wanted, words = with_layout(cfg, layout), []
    keys = [f"parallel.{name}" for name in ("tp", "ep", "dp_replicate", "replicate_experts", *CHOSEN)]
    for key in (*keys, "moe.form", "train.microbatch"):
        section, name = key.split(".")
        new, old = (getattr(getattr(tree, section), name) for tree in (wanted, cfg))
        if new != old:
            words.append(f"{key}={_word(new)}")
    if cfg.parallel.dp_shard not in (-1, layout.dp_shard):
        words.append("parallel.dp_shard=-1")
    return tuple(words)


def _word(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{','.join(value)}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _has_room(cfg: RunConfig, parameters: Parameters, layout: Layout) -> bool:
    return memory.estimate(cfg, parameters, layout).total <= HEADROOM * cfg.cluster.gpu_memory


def _complexity(cfg: RunConfig, c: Cost) -> tuple[float, ...]:
    """Fewer axes and fewer choices that are not the default first, then the larger microbatch (fewer gathers)."""
    at = c.layout
    again = (at.activation_checkpointing != "none", len(at.keep), at.checkpoint_blocks != 1.0)
    axes = (at.tp, at.dp_replicate, at.edp_replicate, at.exchange != "flat", at.form != cfg.moe.form)
    rest = (at.reduce_gradients != "step", FREED[::-1].index(at.reshard_after_forward), at.overlap_chunks, at.ep)
    return (*again, *axes, *rest, -at.microbatch, c.memory.total)


def _is_valid(cfg: RunConfig, layout: Layout) -> bool:
    try:
        validate(with_layout(cfg, layout), world=layout.world)
    except ConfigError:
        return False
    return True

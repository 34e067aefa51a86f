"""The plan of a run: what it would cost, whether it fits, a better layout if there is one, and what wastes the machine.
CPU only, no process group."""

from __future__ import annotations

from dataclasses import dataclass

from ecdit_train.config.schema import RunConfig

from . import low_precision, search, slots
from . import parameters as parameters_
from .cost import Cost, cost, of_stage, products_seconds
from .layout import resolve
from .memory import MASTER
from .parameters import Parameters, Table1, table1

FEW_ROWS = 512
"""Rows per expert and GPU below which batched products lose efficiency on an H100 (facts: 360
instead of 559 TFLOP/s)."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Steps between which no shape changes (`RouterConfig.stages`)."""

    first: int
    """Updates that were made before it."""
    last: int
    """Updates that were made at its end."""
    experts_per_token: float
    cost: Cost

    @property
    def seconds(self) -> float:
        """Of all its steps."""
        return (self.last - self.first) * self.cost.step_time.seconds


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run planned on `cost.layout.world` ranks."""

    cfg: RunConfig
    """The run in its slowest stage."""
    parameters: Parameters
    """Activated as in the last stage."""
    cost: Cost
    """Of the slowest stage, with the largest memory of any."""
    stages: tuple[Stage, ...]
    """First to last; one where no shape changes during the run."""
    checkpoint_bytes: float
    """One committed checkpoint: fp32 weights, optimizer state and average."""
    min_nodes: int | None
    """Fewest nodes on which the layout fits as configured (dp_shard follows); None if no number up to 512 does."""
    suggested: Cost | None
    """The fastest layout found on the same ranks; None when nothing fits or the configured one is within 2 %."""
    suggested_min_nodes: int | None
    """Fewest nodes on which any layout that was searched fits."""
    table1: Table1 | None
    warnings: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return self.cost.fits

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return sum(stage.seconds for stage in self.stages)


def estimate(cfg: RunConfig, *, world: int | None = None) -> Plan:
    """Plan `cfg` on `world` ranks (default: the cluster's nodes times its GPUs per node).

    Raises:
        ConfigError: everything that does not divide, each with the nearest valid value.
    """
    world = cfg.cluster.nodes * cfg.cluster.gpus_per_node if world is None else world
    layout = resolve(cfg, world=world)
    runs = cfg.stages()
    parameters = parameters_.count(runs[-1][1])
    ends = [first for first, _ in runs[1:]] + [cfg.train.steps]
    stages = tuple(
        Stage(
            first=first,
            last=last,
            experts_per_token=slots.experts_per_token(run),
            cost=of_stage(run, parameters, layout),
        )
        for (first, run), last in zip(runs, ends, strict=True)
    )
    slowest = max(range(len(stages)), key=lambda n: stages[n].cost.step_time.seconds)
    configured, at_most = cost(cfg, parameters, layout), runs[slowest][1]
    best = search.best(cfg, parameters, world=world)
    faster = best is not None and (not configured.fits or best.step_time.seconds < 0.98 * configured.step_time.seconds)
    suggested = best if faster else None
    return Plan(
        cfg=at_most,
        parameters=parameters,
        cost=configured,
        stages=stages,
        checkpoint_bytes=checkpoint_bytes(cfg, parameters),
        min_nodes=search.min_nodes(cfg, parameters),
        suggested=suggested,
        suggested_min_nodes=search.min_nodes_any(cfg, parameters),
        table1=table1(cfg, parameters),
        warnings=warnings(at_most, configured),
    )


def checkpoint_bytes(cfg: RunConfig, parameters: Parameters) -> float:
    """Of one committed checkpoint: fp32 weights, optimizer state and average."""
    return parameters.network * (MASTER + slots.average_bytes(cfg)) + parameters.state_bytes


# --- warnings: choices that run but waste the machine ------------------------------------------------------------


def warnings(cfg: RunConfig, cost: Cost) -> tuple[str, ...]:
    """One sentence each, with the figure and the remedy; most expensive first."""
    found = (
        _memory(cfg, cost),
        _eight_bits(cfg, cost),
        *(of(cost) for of in (_encoders, _recompute, _exchange, _weights, _tensor)),
        _rows(cfg, cost),
    )
    return tuple(line for line in found if line)


def _memory(cfg: RunConfig, cost: Cost) -> str | None:
    share = cost.memory.total / cfg.cluster.gpu_memory
    if share > 1:
        return (
            f"does not fit: {share:.2f} times the memory of a {cfg.cluster.gpu}; more nodes, a smaller "
            "train.microbatch or more parallel.activation_checkpointing"
        )
    return f"{share:.0%} of the memory is planned; the estimate is 10 % accurate" if share > 0.92 else None


def _eight_bits(cfg: RunConfig, cost: Cost) -> str | None:
    if cfg.train.recipe is None:
        return None
    if cfg.train.fp8_backend == "emulated":
        return "emulated 8-bit products are priced as bf16's; they take longer, since they are made in fp32"
    faster = low_precision.rate(cfg)
    if faster == 1.0:
        return f"cluster.peak_fp8_flops = 0: 8-bit products are priced as bf16's; a {cfg.cluster.gpu} may refuse to run them"
    done, casts = cost.flops, cost.step_time.casts
    low = done.in_8_bits + done.recompute_in_8_bits
    saved = products_seconds(cfg, cost.layout, flops=low, in_8_bits=low) * (faster - 1)
    if casts < saved:
        return None
    return (
        f"casts to 8 bits take {1e3 * casts:.0f} ms of a step, more than the {1e3 * saved:.0f} ms that their products save: "
        f"train.precision=bf16 is faster{'' if cfg.parallel.compile else ', and parallel.compile=true makes casts cheap'}"
    )


def _encoders(cost: Cost) -> str | None:
    share = cost.flops.frozen_encoders / cost.flops.total
    if share < 0.05:
        return None
    return (
        f"frozen encoders do {share:.0%} of all FLOPs in every step; store their outputs in the shards once "
        "(encoders=shards)"
    )


def _recompute(cost: Cost) -> str | None:
    share = cost.flops.recompute / cost.flops.total
    if share < 0.05:
        return None
    return (
        f"activation checkpointing repeats {share:.0%} of the FLOPs; try a smaller train.microbatch, parallel.keep or "
        "parallel.checkpoint_blocks first"
    )


def _exchange(cost: Cost) -> str | None:
    group, step = cost.layout.group("ep"), cost.step_time
    if group.nodes == 1 or step.exchange_exposed < 0.1 * step.seconds:
        return None
    return (
        f"the expert exchange leaves the node and waits {step.exchange_exposed / step.seconds:.0%} of the step; "
        "raise parallel.overlap_chunks or keep parallel.ep inside a node"
    )


def _weights(cost: Cost) -> str | None:
    step = cost.step_time
    if step.weights_exposed < 0.05 * step.seconds:
        return None
    return (
        f"weights and gradients travel {step.weights_exposed / step.seconds:.0%} of the step longer than the work that "
        "hides them; a larger train.microbatch or a larger parallel.ep sends less"
    )


def _tensor(cost: Cost) -> str | None:
    if cost.layout.tp == 1:
        return None
    if cost.layout.group("tp").nodes > 1:
        return f"parallel.tp = {cost.layout.tp} crosses nodes of {cost.layout.gpus_per_node} GPUs; keep it inside one"
    share = cost.step_time.tensor_parallel / cost.step_time.seconds
    return f"tensor parallelism costs {share:.0%} of the step; it is for layers that do not fit, not for speed"


def _rows(cfg: RunConfig, cost: Cost) -> str | None:
    if not slots.sparse_blocks(cfg) or cfg.cluster.gpu == "cpu":
        return None
    at = cost.layout
    tokens = at.microbatch * cfg.tokens_per_image / at.tp
    rows = tokens * slots.experts_per_token(cfg) * at.ep / slots.num_experts(cfg) / at.overlap_chunks
    if rows >= FEW_ROWS:
        return None
    return (
        f"an expert multiplies {rows:.0f} rows at a time; below {FEW_ROWS} a GPU's matrix products lose speed "
        "(larger train.microbatch, larger parallel.ep or fewer overlap_chunks)"
    )

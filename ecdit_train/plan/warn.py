"""What a plan warns about: choices that run but waste the machine."""

from __future__ import annotations

from ecdit_train.config.schema import RunConfig

from .plan import Cost

FEW_ROWS = 512
"""Rows per expert and GPU below which batched products lose efficiency on an H100 (facts: 360 instead of 559
TFLOP/s)."""


def warnings(cfg: RunConfig, cost: Cost) -> tuple[str, ...]:
    """One sentence each, with the figure and the remedy; most expensive first."""
    found = (
        _memory(cfg, cost),
        _encoders(cfg, cost),
        _recompute(cfg, cost),
        _exchange(cfg, cost),
        _weights(cost),
        _tensor(cfg, cost),
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


def _encoders(cfg: RunConfig, cost: Cost) -> str | None:
    share = cost.flops.frozen_encoders / cost.flops.total
    if share < 0.05:
        return None
    return (
        f"frozen encoders do {share:.0%} of all FLOPs in every step; store their outputs in the shards once "
        "(encoders=shards)"
    )


def _recompute(cfg: RunConfig, cost: Cost) -> str | None:
    if cost.layout.activation_checkpointing == "none":
        return None
    share = cost.flops.recompute / cost.flops.total
    return (
        f"activation checkpointing repeats {share:.0%} of the FLOPs; try a smaller train.microbatch with "
        "parallel.activation_checkpointing=none first"
    )


def _exchange(cfg: RunConfig, cost: Cost) -> str | None:
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


def _tensor(cfg: RunConfig, cost: Cost) -> str | None:
    if cost.layout.tp == 1:
        return None
    if cost.layout.group("tp").nodes > 1:
        return f"parallel.tp = {cost.layout.tp} crosses nodes of {cost.layout.gpus_per_node} GPUs; keep it inside one"
    share = cost.step_time.tensor_parallel / cost.step_time.seconds
    return f"tensor parallelism costs {share:.0%} of the step; it is for layers that do not fit, not for speed"


def _rows(cfg: RunConfig, cost: Cost) -> str | None:
    if cfg.moe.router == "dense" or cfg.cluster.gpu == "cpu":
        return None
    at = cost.layout
    tokens = at.microbatch * cfg.tokens_per_image / at.tp
    rows = tokens * cfg.moe.capacity_factor * at.ep / cfg.moe.experts / at.overlap_chunks
    if rows >= FEW_ROWS:
        return None
    return (
        f"an expert multiplies {rows:.0f} rows at a time; below {FEW_ROWS} a GPU's matrix products lose speed "
        "(larger train.microbatch, larger parallel.ep or fewer overlap_chunks)"
    )

"""What a run says of itself before anything slow is imported: which model, on what, where. Imports no torch."""

from __future__ import annotations

from importlib import metadata

from ecdit_train.config.schema import RunConfig


def opening(config: RunConfig, *, version: str, world: int, goes_on: bool) -> str:
    """Two lines: the run and its layout; the network and its schedule."""
    p, t = config.parallel, config.train
    shard = world // (p.dp_replicate * p.tp) if p.dp_shard == -1 else p.dp_shard
    degrees = {"replicate": p.dp_replicate, "shard": shard, "tp": p.tp, "ep": p.ep}
    layout = ", ".join(f"{name} {size}" for name, size in degrees.items() if size > 1) or "not spread"
    ranks = f"{world} rank{'s' * (world > 1)}"
    return (
        f"ecdit {version}: {config.experiment} {'goes on' if goes_on else 'starts'} in {config.run} on {ranks} ({layout})\n"
        f"  {network(config)}; {t.steps:,} steps of {t.global_batch:,} images, {t.precision}"
    )


def version() -> str:
    try:
        return metadata.version("ecdit")
    except metadata.PackageNotFoundError:  # run from a checkout
        return "(not installed)"


def network(config: RunConfig) -> str:
    """`4 layers of width 128, 8 experts in 2 of them (expertchoice, 2 a token), 24 x 24 pixels`."""
    m, moe = config.model, config.moe
    side = config.data.resolution
    sparse = "dense"
    if moe.router is not None:
        router = type(moe.router).__name__
        blocks = len(config.sparse_layers)
        sparse = f"{moe.num_experts} experts in {blocks} of them ({router}, {moe.router.experts_per_token():g} a token)"
    return f"{m.name}: {m.layers} layers of width {m.width}, {sparse}, {side} x {side} pixels"


def parameters(*, total: int, active: float, device: str, threads: int) -> str:
    """One line, once they are counted: of the trained network, without the frozen encoders."""
    where = f"{device}, {threads} thread{'s' * (threads > 1)} a rank" if device == "cpu" else device
    return f"  {short(total)} parameters, {short(active)} of them work on a token; {where}"


def short(count: float) -> str:
    """1.9M, 97.2B: three digits at most before the point, one after it."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return f"{count:.0f}"

"""The plan of a run: what it would cost, whether it fits, and a better layout if there is one. CPU only, no process
group."""

from __future__ import annotations

from dataclasses import dataclass

from ecdit_train.config.schema import RunConfig

from . import flops as flops_
from . import layout as layout_
from . import memory as memory_
from . import parameters as parameters_
from . import step_time as step_time_
from . import table1, traffic
from .flops import Flops
from .layout import Layout
from .memory import EMA, MASTER, OPTIMIZER, Memory
from .parameters import Parameters
from .step_time import StepTime
from .traffic import Flow


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one layout costs."""

    layout: Layout
    flops: Flops
    memory: Memory
    traffic: tuple[Flow, ...]
    step_time: StepTime
    fits: bool


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run planned on `cost.layout.world` ranks."""

    cfg: RunConfig
    parameters: Parameters
    cost: Cost
    checkpoint_bytes: float
    """One committed checkpoint: fp32 weights, optimizer state and average."""
    min_nodes: int | None
    """Fewest nodes on which the layout fits as configured (dp_shard follows); None if no number up to 512 does."""
    suggested: Cost | None
    """The fastest layout found on the same ranks; None when nothing fits or the configured one is within 2 %."""
    suggested_min_nodes: int | None
    """Fewest nodes on which any layout that was searched fits."""
    table1: table1.Comparison | None
    warnings: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return self.cost.fits


def cost(cfg: RunConfig, parameters: Parameters, layout: Layout) -> Cost:
    """Pure arithmetic; microseconds."""
    flops = flops_.per_step(cfg, checkpointing=layout.activation_checkpointing)
    memory = memory_.estimate(cfg, parameters, layout)
    flows = traffic.per_step(cfg, parameters, layout)
    step = step_time_.estimate(cfg, layout, flops=flops, memory=memory, flows=flows)
    return Cost(
        layout=layout,
        flops=flops,
        memory=memory,
        traffic=flows,
        step_time=step,
        fits=memory.total <= cfg.cluster.gpu_memory,
    )


def estimate(cfg: RunConfig, *, world: int | None = None) -> Plan:
    """Plan `cfg` on `world` ranks (default: the cluster's nodes times its GPUs per node).

    Raises:
        ConfigError: everything that does not divide, each with the nearest valid value.
    """
    from . import suggest, warn  # both price layouts with `cost`

    world = cfg.cluster.nodes * cfg.cluster.gpus_per_node if world is None else world
    layout = layout_.resolve(cfg, world=world)
    parameters = parameters_.count(cfg)
    here = cost(cfg, parameters, layout)
    best = suggest.best(cfg, parameters, world=world)
    faster = best is not None and (not here.fits or best.step_time.seconds < 0.98 * here.step_time.seconds)
    suggested = best if faster else None
    return Plan(
        cfg=cfg,
        parameters=parameters,
        cost=here,
        checkpoint_bytes=parameters.network * (MASTER + OPTIMIZER + (EMA if cfg.optim.ema_decay > 0 else 0)),
        min_nodes=suggest.min_nodes(cfg, parameters),
        suggested=suggested,
        suggested_min_nodes=suggest.min_nodes_any(cfg, parameters),
        table1=table1.compare(cfg.model, cfg.moe, total=parameters.total, activated=parameters.activated),
        warnings=warn.warnings(cfg, here),
    )

"""Bytes on one rank, by part, at the worst moment of a step.

Every part has a formula; `c` is the size of the compute type.

    part            bytes
    parameters      4 per element held: fp32 master weights, sharded
    gradients       4 per element held: fp32, sharded; with several microbatches instead 4 per element *gathered*, of
                    all units: FSDP sums whole gradients and reduces them once a step (parallel.fsdp.accumulate)
    optimizer       8 per element held; rmsprop: mean square and momentum, adamw: two moments
    ema             4 per element held; 0 when it is off
    gathered        compute copies that FSDP has all-gathered: the root, and two neighbouring blocks with their
                    experts (all blocks when reshard_after_forward is off)
    communication   whichever is more: the fp32 buffer in which the smaller kind of block's gradient is being reduced
                    while its larger neighbour is recomputed, and the expert exchange's two buffers of f_c rows per
                    token; or the larger kind's own fp32 buffer less that block's activations, which are freed by then
    activations     plan/activations.py
    encoders        frozen encoders in the compute type, whole on every rank, when they run inside training
    framework       device context, communicators and library workspaces; nothing on a CPU
    never_together  what to take off the sum: with one microbatch, gradients appear as kept activations are freed, so
                    only the larger of the two is ever there
"""

from __future__ import annotations

from dataclasses import dataclass

from ecdit_train.config.schema import RunConfig

from . import activations as activations_
from .layout import Layout
from .parameters import Parameters
from .shards import units

FRAMEWORK_BYTES = 2.5e9
"""CUDA context, NCCL buffers and cuBLAS workspaces of one process (estimate)."""

MASTER, GRADIENT, OPTIMIZER, EMA = 4, 4, 8, 4
"""fp32 bytes per element held."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one rank."""

    parameters: float
    gradients: float
    optimizer: float
    ema: float
    gathered: float
    communication: float
    activations: float
    encoders: float
    framework: float
    never_together: float
    """Subtracted from the sum."""

    @property
    def state(self) -> float:
        """What a rank holds between steps, gradients included."""
        return self.parameters + self.gradients + self.optimizer + self.ema

    @property
    def total(self) -> float:
        parts = self.state + self.gathered + self.communication + self.activations + self.encoders + self.framework
        return parts - self.never_together


def estimate(cfg: RunConfig, parameters: Parameters, layout: Layout) -> Memory:
    """Memory of one rank under `layout`."""
    kinds = {unit.name: unit for unit in units(cfg, parameters, layout)}
    held = sum(unit.held for unit in kinds.values())
    c = activations_.element_bytes(cfg.train.precision)
    size = {name: unit.gathered_bytes for name, unit in kinds.items()}
    dense = size.get("dense block", 0)
    sparse = size.get("sparse block", 0) + size.get("router", 0) + size.get("experts", 0)
    if layout.reshard_after_forward:
        resident = size["root"] + (dense + sparse if dense and sparse else 2 * (dense + sparse))
    else:
        resident = sum(unit.gathered_bytes * unit.count for unit in kinds.values())
    whole = sum(unit.gathered * unit.count for unit in kinds.values())
    gradients = GRADIENT * (held if layout.microbatches == 1 else whole)
    kept = activations_.estimate(cfg, layout)
    rows = layout.microbatch * cfg.tokens_per_image * cfg.moe.capacity_factor / layout.tp
    exchange = 2 * rows * cfg.model.width * c if layout.ep > 1 else 0.0
    # The fp32 buffers that gradients are reduced in.
    neighbour = (min(dense, sparse) or dense) * GRADIENT / c
    own = max(dense, sparse) * GRADIENT / c
    return Memory(
        parameters=MASTER * held,
        gradients=gradients,
        optimizer=OPTIMIZER * held,
        ema=EMA * held if cfg.optim.ema_decay > 0 else 0.0,
        gathered=resident,
        communication=max(neighbour + exchange, own - kept.block - kept.workspace),
        activations=kept.total,
        never_together=min(gradients, kept.kept) if layout.microbatches == 1 else 0.0,
        encoders=c * running_encoders(cfg),
        framework=FRAMEWORK_BYTES if cfg.cluster.gpu != "cpu" else 0.0,
    )


def running_encoders(cfg: RunConfig) -> int:
    """Parameters of the frozen encoders that run inside training."""
    text, image = cfg.encoders.text, cfg.encoders.image
    return (text.parameters if text.kind == "t5" else 0) + (image.parameters if image.kind == "kl" else 0)

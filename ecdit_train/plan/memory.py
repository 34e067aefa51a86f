"""Bytes on one rank, by part, at the worst moment of a step.

Every part has a formula; `c` is the size of the compute type.

    part            bytes
    parameters      4 per element held: fp32 master weights, sharded
    gradients       4 per element held: fp32, sharded; with several microbatches that are reduced once a step instead 4 per
                    element *gathered*, of all units: FSDP sums whole gradients then (parallel.fsdp.accumulate)
    optimizer       what the optimizer says of each parameter: 8 per element held (rmsprop: mean square and momentum, 4
                    without momentum; adamw: two moments), muon: 4 for its matrices
    ema             4 per element held; 0 when it is off
    gathered        compute copies that FSDP has all-gathered: the root, and two neighbouring blocks with their
                    experts; all blocks, or all experts, where reshard_after_forward does not free them
    communication   whichever is more: the fp32 buffer in which the smaller kind of block's gradient is being reduced
                    while its larger neighbour is recomputed, and the expert exchange's two buffers of f_c rows per
                    token, three where it is hierarchical; or the larger kind's own fp32 buffer less that block's
                    activations, which are freed by then
    activations     plan/activations.py
    fp8_history     what `train.fp8_recipe=delayed` remembers (plan/low_precision.py); 0 otherwise
    prepared_batches  the step's batch, the next one and the last (plan/prepared.py)
    encoders        frozen encoders in the compute type, whole on every rank, when they run inside training
    framework       device context, communicators and library workspaces; nothing on a CPU
    never_together  what to take off the sum: with one microbatch, gradients appear as kept activations are freed, so
                    only the larger of the two is ever there

Optimizers work block by block (64 MiB), so that what an update needs besides is less than backward has freed by then.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ecdit_train.config.schema import RunConfig

from . import low_precision, slots
from .activations import activations
from .layout import Layout, Unit, element_bytes, units
from .parameters import Parameters
from .prepared import prepared_batches
from .traffic import exchange_bytes

FRAMEWORK_BYTES = 2.5e9
"""CUDA context, NCCL buffers and cuBLAS workspaces of one process (estimate)."""

MASTER, GRADIENT = 4, 4
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
    fp8_history: float
    prepared_batches: float
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
        passes = self.gathered + self.communication + self.activations - self.never_together
        return self.state + passes + self.fp8_history + self.prepared_batches + self.encoders + self.framework


def estimate(cfg: RunConfig, parameters: Parameters, layout: Layout) -> Memory:
    """Memory of one rank under `layout`; of several stages the largest."""
    return max((_of_stage(stage, parameters, layout) for _, stage in cfg.stages()), key=lambda m: m.total)


def _of_stage(cfg: RunConfig, parameters: Parameters, layout: Layout) -> Memory:
    kinds = units(cfg, parameters, layout)
    held = sum(unit.held for unit in kinds)
    c = element_bytes(cfg)
    whole = sum(unit.gathered * unit.count for unit in kinds)
    gradients = GRADIENT * (whole if layout.accumulates_whole else held)
    kept = activations(cfg, layout)
    buffers = (3 if layout.exchange == "hierarchical" else 2) if layout.ep > 1 else 0
    # The fp32 buffers that gradients are reduced in.
    dense, sparse = _blocks(kinds)
    neighbour = (min(dense, sparse) or dense) * GRADIENT / c
    own = max(dense, sparse) * GRADIENT / c
    return Memory(
        parameters=MASTER * held,
        gradients=gradients,
        optimizer=sum(unit.count * unit.state / unit.shards for unit in kinds),
        ema=slots.average_bytes(cfg) * held,
        gathered=_resident(kinds),
        communication=max(neighbour + buffers * exchange_bytes(cfg, layout), own - kept.block - kept.workspace),
        activations=kept.total,
        never_together=min(gradients, kept.kept) if layout.microbatches == 1 else 0.0,
        fp8_history=low_precision.remembered(cfg, layout),
        prepared_batches=prepared_batches(cfg, layout),
        encoders=c * slots.running_encoder_parameters(cfg),
        framework=FRAMEWORK_BYTES if cfg.cluster.gpu != "cpu" else 0.0,
    )


def _blocks(kinds: Iterable[Unit]) -> tuple[int, int]:
    """Gathered bytes of one dense and of one sparse block, with router and experts."""
    size = {unit.name: unit.gathered_bytes for unit in kinds}
    sparse = sum(size.get(name, 0) for name in ("sparse block", "router", "experts"))
    return size.get("dense block", 0), sparse


def _resident(kinds: Iterable[Unit]) -> float:
    """Of what is freed after forward, two neighbouring blocks; all of the rest."""
    kinds = tuple(kinds)
    dense, sparse = _blocks(unit for unit in kinds if unit.freed)
    alternate = all(any(unit.name == f"{kind} block" for unit in kinds) for kind in ("dense", "sparse"))
    two = dense + sparse if alternate else 2 * (dense + sparse)
    return two + sum(unit.gathered_bytes * unit.count for unit in kinds if not unit.freed)

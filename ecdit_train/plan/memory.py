"""Bytes on one rank, by part, at the worst moment of a step.

Every part has a formula; `c` is the size of the compute type.

    part            bytes
    parameters      4 per element held: fp32 master weights, sharded
    gradients       4 per element held: fp32, sharded; with several microbatches instead 4 per element *gathered*, of
                    all units: FSDP sums whole gradients and reduces them once a step (parallel.fsdp.accumulate)
    optimizer       what the optimizer says of each parameter: 8 per element held (rmsprop: mean square and momentum, 4
                    without momentum; adamw: two moments), muon: 4 for its matrices
    ema             4 per element held; 0 when it is off
    gathered        compute copies that FSDP has all-gathered: the root, and two neighbouring blocks with their
                    experts (all blocks when reshard_after_forward is off)
    communication   whichever is more: the fp32 buffer in which the smaller kind of block's gradient is being reduced
                    while its larger neighbour is recomputed, and the expert exchange's two buffers of f_c rows per
                    token; or the larger kind's own fp32 buffer less that block's activations, which are freed by then
    activations     see below
    encoders        frozen encoders in the compute type, whole on every rank, when they run inside training
    framework       device context, communicators and library workspaces; nothing on a CPU
    never_together  what to take off the sum: with one microbatch, gradients appear as kept activations are freed, so
                    only the larger of the two is ever there

Activations, in eager mode, are what autograd keeps between forward and backward of one microbatch. Unit: one row of
width d per token, in the compute type (2 d bytes in bf16). A block of width d with h heads, k key/value heads, ratio r
and S image tokens for L text tokens keeps, with tensor parallelism of degree p dividing what stands in brackets:

    both modulated norms     3 + 3    input, normalised, modulated
    self-attention           [1 + 2k/h + 1] + 1     q, k v, result; projected result (the gate's gradient needs it)
    cross-attention          2 + [1 + 1 + 2L/S]     input, normalised; q, result; k v of the text
    dense feed-forward       [2r] + 1               before and after GELU; output
    sparse feed-forward      2 + [f_c (1 + 2r + 1 + 1)] + 1
                             router input in fp32; rows, before and after GELU, result, weighted; output
    shared experts           [hidden values] + 1    a value for each matrix of theirs; output

Attention keeps 4 h more bytes per token (log-sum-exp), the router 8 E (affinities), assignments 16 f_c.
A compiled block keeps less: this is an upper bound. `full` checkpointing keeps a block's input only and holds one
block at a time in backward; `selective` also keeps what collectives of the sparse layer brought: rows out and back,
[2 f_c], and with tensor parallelism their sum, 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from ecdit_train.config.schema import RunConfig

from . import slots
from .layout import Layout, element_bytes, units
from .parameters import Parameters
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
    """Memory of one rank under `layout`; of several stages the largest."""
    return max((_of_stage(stage, parameters, layout) for _, stage in cfg.stages()), key=lambda m: m.total)


def _of_stage(cfg: RunConfig, parameters: Parameters, layout: Layout) -> Memory:
    kinds = {unit.name: unit for unit in units(cfg, parameters, layout)}
    held = sum(unit.held for unit in kinds.values())
    c = element_bytes(cfg)
    size = {name: unit.gathered_bytes for name, unit in kinds.items()}
    dense = size.get("dense block", 0)
    sparse = size.get("sparse block", 0) + size.get("router", 0) + size.get("experts", 0)
    if layout.reshard_after_forward != "none":
        resident = size["root"] + (dense + sparse if dense and sparse else 2 * (dense + sparse))
    else:
        resident = sum(unit.gathered_bytes * unit.count for unit in kinds.values())
    whole = sum(unit.gathered * unit.count for unit in kinds.values())
    gradients = GRADIENT * (held if layout.microbatches == 1 else whole)
    kept = activations(cfg, layout)
    exchange = 2 * exchange_bytes(cfg, layout) if layout.ep > 1 else 0.0
    # The fp32 buffers that gradients are reduced in.
    neighbour = (min(dense, sparse) or dense) * GRADIENT / c
    own = max(dense, sparse) * GRADIENT / c
    return Memory(
        parameters=MASTER * held,
        gradients=gradients,
        optimizer=sum(unit.count * unit.state / unit.shards for unit in kinds.values()),
        ema=slots.average_bytes(cfg) * held,
        gathered=resident,
        communication=max(neighbour + exchange, own - kept.block - kept.workspace),
        activations=kept.total,
        never_together=min(gradients, kept.kept) if layout.microbatches == 1 else 0.0,
        encoders=c * slots.running_encoder_parameters(cfg),
        framework=FRAMEWORK_BYTES if cfg.cluster.gpu != "cpu" else 0.0,
    )


# --- activations -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes on one rank."""

    kept: float
    """Alive when the forward pass ends."""
    recomputed: float
    """Of the one block that is recomputed in backward; 0 without checkpointing."""
    block: float
    """Of one block of the larger kind, all of it."""
    workspace: float
    """Gradients of activations beyond what backward has freed by then: one hidden layer's, and 4 rows."""

    @property
    def total(self) -> float:
        return self.kept + self.recomputed + self.workspace


def activations(cfg: RunConfig, layout: Layout) -> Activations:
    """Activation memory of one rank."""
    m, c, tp = cfg.model, element_bytes(cfg), layout.tp
    sparse_blocks = slots.sparse_blocks(cfg)
    tokens = layout.microbatch * cfg.tokens_per_image
    row = tokens * m.width * c
    common, dense, sparse = (u * row for u in block_units(cfg, tp=tp))
    common += tokens * 2 * 4 * m.heads / tp
    # Shift, scale and gate of every image and block.
    common += layout.microbatch * 12 * m.width * c
    sparse += tokens * (slots.router_activation_bytes_per_token(cfg) + slots.assignment_bytes_per_token(cfg) / tp)
    exchanged = 2 * exchange_bytes(cfg, layout)
    largest = common + (sparse if sparse_blocks else dense)
    block, mode = largest, layout.activation_checkpointing
    if mode == "none":
        blocks, recomputed = m.layers * common + (m.layers - sparse_blocks) * dense + sparse_blocks * sparse, 0.0
    else:
        blocks = m.layers * row
        if mode == "selective":
            blocks += sparse_blocks * ((exchanged if layout.ep > 1 else 0.0) + (row if tp > 1 else 0.0))
            # The rows that came back are kept already.
            largest -= exchanged / 2 if layout.ep > 1 else 0.0
        # The block's input is kept already, and the output layer's three rows are gone when the last block is
        # recomputed.
        recomputed = max(largest - 4 * row, 0.0)
    hidden = float(m.ffn_ratio)
    if sparse_blocks:
        hidden = max(hidden, slots.experts_per_token(cfg) * slots.expert_hidden_units_per_row(cfg))
    return Activations(
        kept=blocks + outside_blocks(cfg, images=layout.microbatch),
        recomputed=recomputed,
        block=block,
        workspace=row * (hidden / tp + 4),
    )


def block_units(cfg: RunConfig, *, tp: int) -> tuple[float, float, float]:
    """Kept rows of width d per token: every block, dense feed-forward, sparse feed-forward without its router
    (see the module's table)."""
    m = cfg.model
    kv = 2 * max(m.kv_heads / tp, 1.0) / m.heads
    text = 2 * slots.text_tokens(cfg) / cfg.tokens_per_image
    common = (3 + 3 + 1) + 2 / tp + kv + (2 + (2 + text) / tp if m.cross_attention else 0)
    dense = 2 * m.ffn_ratio / tp + 1
    shared = slots.shared_parameters(cfg) / m.width**2
    sparse = slots.experts_per_token(cfg) * slots.expert_kept_units_per_row(cfg) / tp + 1
    sparse += shared / tp + 1 if shared else 0
    return common, dense, sparse


def outside_blocks(cfg: RunConfig, *, images: int) -> float:
    """Bytes kept outside the blocks, which no checkpointing frees: text refiner (16 rows of the text width per token
    and layer, 3 more around it), the text features, and the output layer (3 rows of width d per token)."""
    m, c = cfg.model, element_bytes(cfg)
    text_tokens = images * slots.text_tokens(cfg)
    text = text_tokens * c * ((16 * m.text_refiner_layers + 3) * m.text_width + slots.text_features(cfg))
    return text + images * cfg.tokens_per_image * 3 * m.width * c

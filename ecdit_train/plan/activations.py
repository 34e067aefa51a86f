"""Bytes that autograd keeps between forward and backward, on one rank and for one microbatch, in eager mode.

Unit: one row of width d per token, in the compute type (2 d bytes in bf16). A block of width d with h heads, k
key/value heads, ratio r and S image tokens for L text tokens keeps, with tensor parallelism of degree p dividing what
stands in brackets:

    both modulated norms     3 + 3    input, normalised, modulated
    self-attention           [1 + 2k/h + 1] + 1     q, k v, result; projected result (the gate's gradient needs it)
    cross-attention          2 + [1 + 1 + 2L/S]     input, normalised; q, result; k v of the text
    dense feed-forward       [2r] + 1               before and after GELU; output
    sparse feed-forward      2 + [f_c (1 + 2r + 1 + 1)] + 1
                             router input in fp32; rows, before and after GELU, result, weighted; output

Attention keeps 4 h more bytes per token (log-sum-exp), the router 8 E (affinities), assignments 16 f_c.
A compiled block keeps less: this is an upper bound. `full` checkpointing keeps a block's input only and holds one
block at a time in backward; `selective` also keeps what collectives of the sparse layer brought: rows out and back,
[2 f_c], and with tensor parallelism their sum, 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from ecdit_train.config.schema import RunConfig

from .layout import Layout


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


def element_bytes(precision: str) -> int:
    """Bytes of one element of the compute type."""
    return {"fp32": 4, "bf16": 2}[precision]


def estimate(cfg: RunConfig, layout: Layout) -> Activations:
    """Activation memory of one rank."""
    m, c, tp = cfg.model, element_bytes(cfg.train.precision), layout.tp
    sparse_blocks = 0 if cfg.moe.router == "dense" else m.layers // 2
    tokens = layout.microbatch * cfg.tokens_per_image
    row = tokens * m.width * c
    common, dense, sparse = (u * row for u in block_units(cfg, tp=tp))
    common += tokens * 2 * 4 * m.heads / tp
    # Shift, scale and gate of every image and block.
    common += layout.microbatch * 12 * m.width * c
    fc = cfg.moe.capacity_factor
    sparse += tokens * (8 * cfg.moe.experts + 16 * fc / tp) if sparse_blocks else 0.0
    exchanged = 2 * fc * row / tp
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
    hidden = m.ffn_ratio * (max(fc, 1.0) if sparse_blocks else 1.0) / tp
    return Activations(
        kept=blocks + outside_blocks(cfg, images=layout.microbatch),
        recomputed=recomputed,
        block=block,
        workspace=row * (hidden + 4),
    )


def block_units(cfg: RunConfig, *, tp: int) -> tuple[float, float, float]:
    """Kept rows of width d per token: every block, dense feed-forward, sparse feed-forward (see the module's table)."""
    m, fc = cfg.model, cfg.moe.capacity_factor
    kv = 2 * max(m.kv_heads / tp, 1.0) / m.heads
    text = 2 * cfg.encoders.text.max_tokens / cfg.tokens_per_image
    common = (3 + 3 + 1 + 2) + 2 / tp + kv + (2 + text) / tp
    dense = 2 * m.ffn_ratio / tp + 1
    router = 2 if cfg.train.precision == "bf16" else 0
    sparse = router + fc * (3 + 2 * m.ffn_ratio) / tp + 1
    return common, dense, sparse


def outside_blocks(cfg: RunConfig, *, images: int) -> float:
    """Bytes kept outside the blocks, which no checkpointing frees: text refiner (16 rows of the text width per token
    and layer, 3 more around it), the text features, and the output layer (3 rows of width d per token)."""
    m, c = cfg.model, element_bytes(cfg.train.precision)
    text_tokens = images * cfg.encoders.text.max_tokens
    text = text_tokens * c * ((16 * m.text_refiner_layers + 3) * m.text_width + cfg.encoders.text.width)
    return text + images * cfg.tokens_per_image * 3 * m.width * c

"""Activations of one rank: what autograd keeps between forward and backward of one microbatch, in eager mode.

Unit: one row of width d per token, in the compute type (2 d bytes in bf16). A block of width d with h heads, k key/value heads,
ratio r and S image tokens for L text tokens keeps, with tensor parallelism of degree p dividing what stands in brackets:

    both modulated norms     3 + 3    input, normalised, modulated
    self-attention           [1 + 2k/h + 1] + 1     q, k v, result; projected result (the gate's gradient needs it)
    cross-attention          2 + [1 + 1 + 2L/S]     input, normalised; q, result; k v of the text
    dense feed-forward       [2r] + 1               before and after GELU; output
    sparse, moe.form=plain   [f_c (1 + 2r + 1 + 1)] + 1    rows, before and after GELU, result, weighted; output
    sparse, moe.form=lean    [f_c (r + x)] + 1      before GELU, and with an exchange (x = 1, else 0) the rows it brought; output
    shared experts           [hidden values] + 1    a value for each matrix of theirs; output

Attention keeps 4 h more bytes per token (log-sum-exp), the router its affinities and the assignment (as it says). A compiled
block keeps less: this is an upper bound.

A checkpointed block keeps its input. `selective` also keeps what collectives of the sparse layer brought, rows out and back [2 f_c]
and with tensor parallelism their sum, 1; and the results of what `parallel.keep` names:

    attention                [1 + 1]                and the log-sum-exp, of both attentions
    projections              [1 + 2k/h] + 1  and  [1 + 2L/S] + 1
    feed_forward             [r] + 1                shared experts likewise
    experts                  [f_c (r + 1)]

Backward makes one block of them at a time again. While it works on one layer, gradients are there beyond what it has freed: one
hidden layer's and 4 rows; in the lean form on a GPU, which works on all of a part's rows at once, [f_c (3r + 5)] of the part.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ecdit_train.config.schema import RunConfig

from . import low_precision, slots
from .layout import Layout, blocks_again, element_bytes
from .traffic import exchange_bytes


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
    """Gradients of activations beyond what backward has freed by then."""

    @property
    def total(self) -> float:
        return self.kept + self.recomputed + self.workspace


@dataclass(frozen=True, kw_only=True)
class Results:
    """Bytes of results that a checkpointed block keeps."""

    bytes: float
    shared: float
    """Of them, those that the block's recomputation would have kept, too."""

    def times(self, factor: float) -> Results:
        return Results(bytes=factor * self.bytes, shared=factor * self.shared)

    @classmethod
    def sum(cls, some: Iterable[Results]) -> Results:
        some = list(some)
        return cls(bytes=sum(one.bytes for one in some), shared=sum(one.shared for one in some))


def activations(cfg: RunConfig, layout: Layout) -> Activations:
    """Activation memory of one rank."""
    m, tokens = cfg.model, layout.microbatch * cfg.tokens_per_image
    row = _row(cfg, layout)
    common, dense, sparse = (u * row for u in block_units(cfg, tp=layout.tp, form=layout.form, travels=layout.ep > 1))
    # Log-sum-exps; shift, scale and gate of every image and block.
    common += 2 * _log_sum_exp(cfg, layout) + layout.microbatch * 12 * m.width * element_bytes(cfg)
    sparse += tokens * (
        slots.router_activation_bytes_per_token(cfg) + slots.assignment_bytes_per_token(cfg) / layout.tp
    )
    more = low_precision.more_kept(cfg, layout)
    common, dense, sparse = common + more.common, dense + more.dense, sparse + more.sparse
    sparse_blocks = slots.sparse_blocks(cfg)
    blocks, largest, recomputed = 0.0, 0.0, 0.0
    for is_sparse, count, whole in (
        (False, m.layers - sparse_blocks, common + dense),
        (True, sparse_blocks, common + sparse),
    ):
        if not count:
            continue
        again, kept = blocks_again(count, layout), results(cfg, layout, sparse=is_sparse)
        blocks += again * (row + kept.bytes) + (count - again) * whole
        largest = whole if is_sparse else max(largest, whole)
        if again:
            # The block's input is kept already, and the output layer's three rows are gone when the last block is recomputed.
            recomputed = max(recomputed if not is_sparse else 0.0, whole - kept.shared - 4 * row)
    return Activations(
        kept=blocks + outside_blocks(cfg, images=layout.microbatch) + more.outside,
        recomputed=recomputed,
        block=largest,
        workspace=_workspace(cfg, layout) + low_precision.workspace(cfg, layout),
    )


def results(cfg: RunConfig, layout: Layout, *, sparse: bool) -> Results:
    """What a checkpointed block of a kind keeps besides its input."""
    if layout.activation_checkpointing != "selective":
        return Results(bytes=0.0, shared=0.0)
    # Emulated 8-bit products are kept as they were added up, in fp32.
    wider = 4 / element_bytes(cfg) if low_precision.emulated(cfg) else 1.0
    found = [
        _kept(cfg, layout, kind, sparse=sparse).times(1.0 if kind == "attention" else wider)
        for kind in low_precision.kinds_kept(cfg, layout.keep)
    ]
    if sparse and layout.ep > 1:
        # In the plain form the rows that came back are what the gates' gradient needs; in the lean one those that were
        # brought are kept, and are the exchange's own result where a rank has one expert.
        rows = exchange_bytes(cfg, layout)
        same = layout.form == "plain" or slots.num_experts(cfg) == layout.ep
        found.append(Results(bytes=2 * rows, shared=rows if same else 0.0))
    if sparse and layout.tp > 1:
        found.append(Results(bytes=_row(cfg, layout), shared=0.0))
    return Results.sum(found)


def _kept(cfg: RunConfig, layout: Layout, kind: str, *, sparse: bool) -> Results:
    """Of one kind of `parallel.keep`."""
    m, tp, row = cfg.model, layout.tp, _row(cfg, layout)
    attentions = 2 if m.cross_attention else 1
    shared = slots.shared_parameters(cfg) / m.width**2 if sparse else 0.0
    if kind == "attention":
        every = attentions * (row / tp + _log_sum_exp(cfg, layout))
        return Results(bytes=every, shared=every)
    if kind == "projections":
        kv, text = _key_value_units(cfg, tp=tp)
        cross = ((1 + text) / tp) * row if m.cross_attention else 0.0
        common = (1 / tp + kv + 1) * row + cross
        return Results(bytes=common + (row if m.cross_attention else 0.0), shared=common)
    if kind == "feed_forward":
        hidden = 0.0 if sparse else float(m.ffn_ratio)
        if sparse and shared:
            hidden = shared * (1 - 1 / slots.shared_matrices(cfg))
        every = (hidden / tp + 1) * row if hidden else 0.0
        return Results(bytes=every, shared=every)
    if not sparse:
        return Results(bytes=0.0, shared=0.0)
    rows = slots.experts_per_token(cfg) * row / tp
    before = slots.expert_first_units_per_row(cfg) * rows
    # The lean form needs no result of a row; what an exchange brought back is another tensor.
    return Results(bytes=before + rows, shared=before + (rows if layout.ep == 1 and layout.form == "plain" else 0.0))


def block_units(cfg: RunConfig, *, tp: int, form: str = "plain", travels: bool = False) -> tuple[float, float, float]:
    """Kept rows of width d per token: every block, dense feed-forward, sparse feed-forward without its router
    (see the module's table). `travels`: whether rows come from other ranks."""
    m = cfg.model
    kv, text = _key_value_units(cfg, tp=tp)
    common = (3 + 3 + 1) + 2 / tp + kv + (2 + (2 + text) / tp if m.cross_attention else 0)
    dense = 2 * m.ffn_ratio / tp + 1
    shared = slots.shared_parameters(cfg) / m.width**2
    units = slots.expert_lean_units_per_row(cfg) + travels if form == "lean" else slots.expert_kept_units_per_row(cfg)
    sparse = slots.experts_per_token(cfg) * units / tp + 1
    sparse += shared / tp + 1 if shared else 0
    return common, dense, sparse


def outside_blocks(cfg: RunConfig, *, images: int) -> float:
    """Bytes kept outside the blocks, which no checkpointing frees: text refiner (16 rows of the text width per token
    and layer, 3 more around it), the text features, and the output layer (3 rows of width d per token)."""
    m, c = cfg.model, element_bytes(cfg)
    text_tokens = images * slots.text_tokens(cfg)
    text = text_tokens * c * ((16 * m.text_refiner_layers + 3) * m.text_width + slots.text_features(cfg))
    return text + images * cfg.tokens_per_image * 3 * m.width * c


def _workspace(cfg: RunConfig, layout: Layout) -> float:
    row, tp, hidden = _row(cfg, layout), layout.tp, float(cfg.model.ffn_ratio)
    if slots.sparse_blocks(cfg):
        hidden = max(hidden, slots.experts_per_token(cfg) * slots.expert_hidden_units_per_row(cfg))
    plain = row * (hidden / tp + 4)
    if layout.form != "lean" or cfg.cluster.gpu == "cpu" or not slots.sparse_blocks(cfg):
        return plain
    parts = layout.overlap_chunks if layout.ep > 1 else 1
    at_once = 2 * slots.expert_lean_units_per_row(cfg) + slots.expert_hidden_units_per_row(cfg) + 5
    return max(plain, row * slots.experts_per_token(cfg) * at_once / tp / parts)


def _key_value_units(cfg: RunConfig, *, tp: int) -> tuple[float, float]:
    """Rows of keys and values: of a rank's share in self-attention, and in cross-attention before it is shared out."""
    m = cfg.model
    return 2 * max(m.kv_heads / tp, 1.0) / m.heads, 2 * slots.text_tokens(cfg) / cfg.tokens_per_image


def _log_sum_exp(cfg: RunConfig, layout: Layout) -> float:
    """Of one attention."""
    return layout.microbatch * cfg.tokens_per_image * 4 * cfg.model.heads / layout.tp


def _row(cfg: RunConfig, layout: Layout) -> float:
    """Bytes of one value of width d for every token."""
    return layout.microbatch * cfg.tokens_per_image * cfg.model.width * element_bytes(cfg)

"""What 8-bit products (`train.precision=fp8`) change of a plan; all zeros in another precision.

products        those of parallel/low_precision.py, at the cluster's `peak_fp8_flops`; where that is 0, or where they are emulated
                in wider types, at the peak of bf16
casts           bytes per value of an operand or a result, counted op by op as model/fp8.py issues them (`Moved`): in eager mode
                a quantised operand is a dozen kernels, two for its largest magnitude and the rest for rounding; compiled each of
                the two is one (`FUSED`). The plain form casts experts' matrices for every part of an exchange, the lean form once
                and its rows in backward again; forward's casts are repeated with a block
agreements      under tensor parallelism one all-reduce of a number for each operand of a linear layer, but with mxfp8
kept            of every operand x, but a lean layer's, 1 byte a value, and its scales: with emulated blocks 4 more. Each product
                keeps its own: queries, keys and values one each where bf16 shares the tokens, cross-attention one of the text in
                every block. What else needs a tensor keeps it too, in bf16: attention its result, the router its tokens, GELU its
                operand
workspace       13 bytes a value of the largest operand while it is rounded, 17 with mxfp8; compiled 1 and 5
remembered      `delayed` has 16 magnitudes of three operands of every matrix, in fp32
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from ecdit_train.config.schema import HEAD_DIM, RunConfig

from . import slots
from .layout import Layout, blocks_again, element_bytes

KEPT = {
    "scaled_mm": 1.0,
    "emulated": 1.0,
    "mxfp8": 5.0,
    "transformer_engine": 1.0,
    "transformer_engine mxfp8": 1 + 1 / 32,
}
"""Bytes a value of an operand in 8 bits, scales included."""
ROUNDING = 12
"""Bytes a value besides, while it is rounded in eager mode; Transformer Engine's casts need less."""
REMEMBERED = 3 * 16 * 4
"""Bytes for every matrix, with `delayed`."""


@dataclass(frozen=True, kw_only=True)
class Moved:
    """Bytes of memory traffic of one product, by value of x, W, and its result or the gradient of that."""

    x: float
    w: float
    y: float
    x_back: float
    w_back: float
    y_back: float


MOVED = {
    "scaled_mm": Moved(x=67, w=67, y=4, x_back=6, w_back=67, y_back=69),
    "emulated": Moved(x=80, w=80, y=6, x_back=19, w_back=80, y_back=93),
    "mxfp8": Moved(x=182.4, w=99.7, y=6, x_back=23, w_back=105.7, y_back=199.4),
    "transformer_engine": Moved(x=9, w=9, y=0, x_back=2, w_back=11, y_back=11),
    "transformer_engine mxfp8": Moved(x=6, w=3, y=0, x_back=0, w_back=3, y_back=6),
}
"""By backend; emulated blocks by themselves. Of Transformer Engine what its casts must read and write, and ours before them."""
CAST = {"scaled_mm": 67.0, "emulated": 67.0, "mxfp8": 82.7, "transformer_engine": 9.0, "transformer_engine mxfp8": 3.0}
"""Of these, one cast of an operand."""
FUSED = {"scaled_mm": 5.0, "emulated": 5.0, "mxfp8": 13.0, "transformer_engine": 5.0, "transformer_engine mxfp8": 3.0}
"""The same compiled: an operand is read for its largest magnitude, and read and written for the rounding; with emulated blocks
the scale of every value is written and read between."""


@dataclass(frozen=True, kw_only=True)
class Product:
    """(R, K) (K, O) of one layer on one rank in one microbatch; R over all matrices of a stack."""

    kind: str
    """attention, dense, shared or experts."""
    rows: float
    width: float
    out: float
    stack: int = 1
    """Matrices."""

    @property
    def x(self) -> float:
        """Values."""
        return self.rows * self.width

    @property
    def w(self) -> float:
        return self.stack * self.width * self.out

    @property
    def y(self) -> float:
        return self.rows * self.out


def products(cfg: RunConfig, layout: Layout) -> tuple[Product, ...]:
    """Of one block that had every kind. None in another precision."""
    return tuple(_products(cfg, layout)) if cfg.train.recipe else ()


def _products(cfg: RunConfig, layout: Layout) -> Iterator[Product]:
    m, tp = cfg.model, layout.tp
    d, q, kv = m.width, m.heads * HEAD_DIM // tp, max(m.kv_heads // tp, 1) * HEAD_DIM
    rows: float
    tokens, text = layout.microbatch * cfg.tokens_per_image, layout.microbatch * slots.text_tokens(cfg)
    attentions = [(tokens, d, q), (tokens, d, kv), (tokens, d, kv), (tokens, q, d)]
    if m.cross_attention:
        attentions += [(tokens, d, q), (text, m.text_width, q), (text, m.text_width, q), (tokens, q, d)]
    for rows, width, out in attentions:
        yield Product(kind="attention", rows=rows, width=width, out=out)
    hidden = m.ffn_ratio * d // tp
    yield Product(kind="dense", rows=tokens, width=d, out=hidden)
    yield Product(kind="dense", rows=tokens, width=hidden, out=d)
    if not slots.sparse_blocks(cfg):
        return
    hidden = round(slots.expert_hidden_units_per_row(cfg) * d)
    first, stack = slots.expert_first_matrices(cfg), slots.num_experts(cfg) // layout.ep
    rows = tokens * slots.experts_per_token(cfg) / tp
    for width, out in [(d, hidden)] * first + [(hidden, d)]:
        yield Product(kind="experts", rows=rows, width=width, out=out, stack=stack)
    if slots.shared_parameters(cfg):
        hidden = cfg.moe.shared_experts * hidden // tp
        for width, out in [(d, hidden)] * (slots.shared_matrices(cfg) - 1) + [(hidden, d)]:
            yield Product(kind="shared", rows=tokens, width=width, out=out)


def _of(found: tuple[Product, ...], *kinds: str) -> list[Product]:
    return [product for product in found if product.kind in kinds]


def _blocks(cfg: RunConfig, layout: Layout) -> tuple[tuple[tuple[str, ...], int, int], ...]:
    """(kinds of products, blocks that have them, those of them that are repeated) of dense and of sparse blocks."""
    sparse = slots.sparse_blocks(cfg)
    dense = cfg.model.layers - sparse
    return (
        (("attention", "dense"), dense, blocks_again(dense, layout)),
        (("attention", "shared", "experts"), sparse, blocks_again(sparse, layout)),
    )


def rate(cfg: RunConfig) -> float:
    """FLOP/s of a GPU's 8-bit products over those of others; 1 where they are no faster."""
    there = cfg.train.recipe and cfg.train.fp8_backend != "emulated" and cfg.cluster.peak_fp8_flops
    return cfg.cluster.peak_fp8_flops / cfg.cluster.peak_flops if there else 1.0


def cast_bytes(cfg: RunConfig, layout: Layout) -> float:
    """What casts move in a rank's memory in a step."""
    found = products(cfg, layout)
    if not found:
        return 0.0
    how = _how(cfg)
    each, cast = MOVED[how], (FUSED if cfg.parallel.compile else CAST)[how]
    saved, twice = CAST[how] - cast, 2 if cfg.train.recipe == "mxfp8" else 1
    total = 0.0
    for kinds, count, again in _blocks(cfg, layout):
        for p in _of(found, *kinds):
            lean = p.kind == "experts" and layout.form == "lean"
            w = p.w * (layout.overlap_chunks if p.kind == "experts" and layout.ep > 1 and not lean else 1)
            forward = (each.x - twice * saved) * p.x + (each.w - saved) * w + each.y * p.y
            backward = each.x_back * p.x + (each.w_back - saved) * w + (each.y_back - twice * saved) * p.y
            if lean and twice == 1:
                backward += cast * p.x
            total += count * (forward + backward) + again * forward
    return layout.microbatches * total


def _how(cfg: RunConfig) -> str:
    backend, blocks = cfg.train.fp8_backend, cfg.train.recipe == "mxfp8"
    return ("mxfp8" if backend == "emulated" else f"{backend} mxfp8") if blocks else backend


def agreements(cfg: RunConfig, layout: Layout) -> int:
    """All-reduces of a number among tp ranks in a step: of x and W in forward, of the result's gradient in backward."""
    if cfg.train.recipe == "mxfp8":
        return 0
    found, total = products(cfg, layout), 0
    for kinds, count, again in _blocks(cfg, layout):
        total += sum(p.kind != "experts" for p in _of(found, *kinds)) * (3 * count + 2 * again)
    return layout.microbatches * total


@dataclass(frozen=True, kw_only=True)
class More:
    """Bytes that autograd keeps more than in bf16; below 0 where it keeps less."""

    common: float = 0.0
    """In every block."""
    dense: float = 0.0
    sparse: float = 0.0
    outside: float = 0.0


def more_kept(cfg: RunConfig, layout: Layout) -> More:
    """In eager mode, of one microbatch."""
    found = products(cfg, layout)
    if not found:
        return More()
    each, c, tp = KEPT[_how(cfg)], element_bytes(cfg), layout.tp
    row = layout.microbatch * cfg.tokens_per_image * cfg.model.width * c
    quantised = {
        kind: each * sum(p.x for p in _of(found, kind)) for kind in ("attention", "dense", "shared", "experts")
    }
    cross = cfg.model.cross_attention
    # The text is one tensor for all blocks, and what a checkpointed one was given.
    text = layout.microbatch * slots.text_tokens(cfg) * cfg.model.text_width * c
    given = any(again for _, _, again in _blocks(cfg, layout))
    # Of bf16's: normalised and modulated tokens, what comes out of activations, and rows.
    sparse = quantised["shared"] - _of_shared(cfg) * row / tp
    if layout.form != "lean":
        rows = slots.experts_per_token(cfg) * row / tp
        sparse += quantised["experts"] - rows * (1 + slots.expert_hidden_units_per_row(cfg))
    return More(
        common=quantised["attention"] - (2 if cross else 1) * row,
        dense=quantised["dense"] - (1 + cfg.model.ffn_ratio / tp) * row,
        sparse=sparse,
        outside=-text if cross and not given else 0.0,
    )


def _of_shared(cfg: RunConfig) -> float:
    """Hidden width of the shared experts over d: what their last product reads."""
    matrices = slots.shared_matrices(cfg)
    return slots.shared_parameters(cfg) / cfg.model.width**2 / matrices if matrices else 0.0


def emulated(cfg: RunConfig) -> bool:
    return cfg.train.recipe is not None and cfg.train.fp8_backend == "emulated"


def kinds_kept(cfg: RunConfig, keep: Collection[str]) -> tuple[str, ...]:
    """`parallel.keep` as parallel/recompute.py understands it: emulated projections are batched products, which are kept with
    attention and never by themselves."""
    if not emulated(cfg):
        return tuple(keep)
    return (*(kind for kind in keep if kind != "projections"), *(["projections"] if "attention" in keep else []))


def workspace(cfg: RunConfig, layout: Layout) -> float:
    """Bytes besides, while the largest operand is rounded."""
    parts = layout.overlap_chunks if layout.ep > 1 else 1
    sizes = [
        size for p in products(cfg, layout) for size in (p.w, max(p.x, p.y) / (parts if p.kind == "experts" else 1))
    ]
    return (KEPT[_how(cfg)] + (0 if cfg.parallel.compile else ROUNDING)) * max(sizes) if sizes else 0.0


def remembered(cfg: RunConfig, layout: Layout) -> float:
    """Bytes of `delayed`'s magnitudes, of the matrices on this rank."""
    if cfg.train.recipe != "delayed":
        return 0.0
    found = products(cfg, layout)
    return REMEMBERED * sum(
        count * sum(p.stack for p in _of(found, *kinds)) for kinds, count, _ in _blocks(cfg, layout)
    )

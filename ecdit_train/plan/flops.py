"""Floating point operations of one optimizer step, by part. A product of (m, k) and (k, n) counts 2 m k n.

Model FLOPs are forward + 2 x backward of everything trained; MFU counts nothing else. Recomputation and the
frozen encoders come on top and are kept apart. With T image tokens and L text tokens, forward, per layer of width
d (h, k heads of 64):

    self-attention    2 T (2 d 64h + 2 d 64k) + 4 T S 64h         S: tokens of an image after masking
    cross-attention   2 T 2 d 64h + 2 L 2 Y 64h + 4 T l 64h       Y: text width, l: text tokens of an image
    feed-forward      2 T 2 d 4d, a sparse layer f_c times that, its router 2 T d E
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from ecdit_train.config.schema import HEAD_DIM, RunConfig
from ecdit_train.model.embed import TimestepEmbedding
from ecdit_train.parallel.recompute import checkpointed

from . import low_precision, slots
from .layout import Layout


@dataclass(frozen=True, kw_only=True)
class Flops:
    """FLOPs of one optimizer step over all ranks."""

    by_part: dict[str, float]
    """Model FLOPs: forward + 2 x backward."""
    recompute: float
    """Forward again in the backward pass, from activation checkpointing."""
    frozen_encoders: float
    """Forward of frozen encoders that run inside training; 0 when their outputs are stored in the shards."""

    in_8_bits: float = 0.0
    """Of the model's, products of 8-bit operands (`train.precision=fp8`)."""
    recompute_in_8_bits: float = 0.0
    """Of what is repeated, the same."""

    @property
    def model(self) -> float:
        return sum(self.by_part.values())

    @property
    def total(self) -> float:
        """What the devices execute."""
        return self.model + self.recompute + self.frozen_encoders


def per_step(cfg: RunConfig, *, checkpointing: str, keep: Collection[str] = (), share: float = 1.0) -> Flops:
    """FLOPs of one optimizer step. `checkpointing`: none, selective or full. Both modes repeat the forward of the blocks they are
    for (`share` of them), selective all but the products of the kinds it keeps."""
    m, images = cfg.model, cfg.train.global_batch
    d, q, kv = m.width, m.heads * HEAD_DIM, m.kv_heads * HEAD_DIM
    S, L, Y, X = cfg.tokens_per_image, slots.text_tokens(cfg), m.text_width, slots.text_features(cfg)
    T, TL = images * S, images * L
    sparse, patch_values = slots.sparse_blocks(cfg), m.patch**2 * slots.latent_channels(cfg)
    dense, cross = m.layers - sparse, int(m.cross_attention)
    # Of one block each: in every block, in dense ones, in sparse ones.
    projections = {
        "self_attention": 2.0 * T * (2 * d * q + 2 * d * kv),
        "cross_attention": cross * (2.0 * T * 2 * d * q + 2.0 * TL * 2 * Y * q),
    }
    attention = {"self_attention": 4.0 * T * S * q, "cross_attention": cross * 4.0 * T * L * q}
    modulation = 2.0 * images * (3 if m.modulation == "shared" else 6) * d * d
    feed_forward = 2.0 * T * 2 * d * m.ffn_ratio * d
    experts = T * slots.experts_per_token(cfg) * slots.expert_flops_per_row(cfg)
    shared = T * 2.0 * slots.shared_parameters(cfg)
    router = T * slots.router_flops_per_token(cfg)
    blocks = {
        **{part: m.layers * (projections[part] + attention[part]) for part in projections},
        "dense_feed_forward": dense * feed_forward,
        "experts": sparse * experts,
        "shared_experts": sparse * shared,
        "router": sparse * router,
        "modulation": m.layers * modulation,
    }
    outside = {
        # All patches are embedded; masking drops some of them afterwards.
        "embedding": 2.0
        * images
        * (cfg.patches_per_image * patch_values * d + TimestepEmbedding.FEATURES * d + d * d + Y * d),
        "text": 2.0 * TL * X * Y + m.text_refiner_layers * (2.0 * TL * 12 * Y * Y + 4.0 * TL * L * Y),
        "modulation": 2.0 * images * (8 if m.modulation == "shared" else 2) * d * d,
        "final": 2.0 * T * d * patch_values,
    }
    by_part = {part: 3.0 * (blocks.get(part, 0.0) + outside.get(part, 0.0)) for part in {**outside, **blocks}}
    kept = set(keep) if checkpointing == "selective" else set()
    in_every = modulation + ("projections" not in kept) * sum(projections.values())
    in_every += ("attention" not in kept) * sum(attention.values())
    in_sparse = router + ("experts" not in kept) * experts + ("feed_forward" not in kept) * shared
    in_dense = ("feed_forward" not in kept) * feed_forward
    low = (sum(projections.values()), feed_forward, experts + shared) if cfg.train.recipe else (0.0, 0.0, 0.0)
    low_again = (
        ("projections" not in kept) * low[0] + ("feed_forward" not in kept) * low[1],
        ("projections" not in kept) * low[0] + (in_sparse - router) * bool(cfg.train.recipe),
    )
    again = [0 if checkpointing == "none" else len(checkpointed(n, share=share)) for n in (dense, sparse)]
    return Flops(
        by_part=dict(sorted(by_part.items())),
        recompute=sum(n * (in_every + own) for n, own in zip(again, (in_dense, in_sparse), strict=True)),
        frozen_encoders=images * slots.encoder_flops_per_image(cfg),
        in_8_bits=3.0 * (m.layers * low[0] + dense * low[1] + sparse * low[2]),
        recompute_in_8_bits=sum(n * own for n, own in zip(again, low_again, strict=True)),
    )


def of_layout(cfg: RunConfig, layout: Layout) -> Flops:
    """FLOPs of one optimizer step under what a layout recomputes."""
    mode, share = layout.activation_checkpointing, layout.checkpoint_blocks
    keep = low_precision.kinds_kept(cfg, layout.keep)
    return per_step(cfg, checkpointing=mode, keep=keep, share=share)

"""Floating point operations of one optimizer step, by part. A product of (m, k) and (k, n) counts 2 m k n.

Model FLOPs are forward + 2 x backward of everything trained; MFU counts nothing else. Recomputation and the
frozen encoders come on top and are kept apart. With T image tokens and L text tokens, forward, per layer of width
d (h, k heads of 64):

    self-attention    2 T (2 d 64h + 2 d 64k) + 4 T S 64h         S: tokens of an image after masking
    cross-attention   2 T 2 d 64h + 2 L 2 Y 64h + 4 T l 64h       Y: text width, l: text tokens of an image
    feed-forward      2 T 2 d 4d, a sparse layer f_c times that, its router 2 T d E
"""

from __future__ import annotations

from dataclasses import dataclass

from ecdit_train.config.schema import HEAD_DIM, RunConfig
from ecdit_train.model.embed import TimestepEmbedding

from . import slots


@dataclass(frozen=True, kw_only=True)
class Flops:
    """FLOPs of one optimizer step over all ranks."""

    by_part: dict[str, float]
    """Model FLOPs: forward + 2 x backward."""
    recompute: float
    """Forward again in the backward pass, from activation checkpointing."""
    frozen_encoders: float
    """Forward of frozen encoders that run inside training; 0 when their outputs are stored in the shards."""

    @property
    def model(self) -> float:
        return sum(self.by_part.values())

    @property
    def total(self) -> float:
        """What the devices execute."""
        return self.model + self.recompute + self.frozen_encoders


def per_step(cfg: RunConfig, *, checkpointing: str) -> Flops:
    """FLOPs of one optimizer step. `checkpointing`: none, selective or full. Selective keeps the results of
    collectives and recomputes everything else of a block, so both modes repeat the blocks' forward."""
    m, images = cfg.model, cfg.train.global_batch
    d, q, kv = m.width, m.heads * HEAD_DIM, m.kv_heads * HEAD_DIM
    S, L, Y, X = cfg.tokens_per_image, slots.text_tokens(cfg), m.text_width, slots.text_features(cfg)
    T, TL = images * S, images * L
    sparse, patch_values = slots.sparse_blocks(cfg), m.patch**2 * slots.latent_channels(cfg)
    blocks = {
        "self_attention": m.layers * (2.0 * T * (2 * d * q + 2 * d * kv) + 4.0 * T * S * q),
        "cross_attention": m.cross_attention
        * m.layers
        * (2.0 * T * 2 * d * q + 2.0 * TL * 2 * Y * q + 4.0 * T * L * q),
        "dense_feed_forward": (m.layers - sparse) * 2.0 * T * 2 * d * m.ffn_ratio * d,
        "experts": sparse * T * slots.experts_per_token(cfg) * slots.expert_flops_per_row(cfg),
        "shared_experts": sparse * T * 2.0 * slots.shared_parameters(cfg),
        "router": sparse * T * slots.router_flops_per_token(cfg),
        "modulation": m.layers * 2.0 * images * (3 if m.modulation == "shared" else 6) * d * d,
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
    recompute = 0.0 if checkpointing == "none" else sum(blocks.values())
    return Flops(
        by_part=dict(sorted(by_part.items())),
        recompute=recompute,
        frozen_encoders=images * slots.encoder_flops_per_image(cfg),
    )

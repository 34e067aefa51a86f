"""Floating point operations of one optimizer step, by part. A product of (m, k) and (k, n) counts 2 m k n.

Model FLOPs are forward + 2 x backward of everything trained; MFU counts nothing else. Recomputation and the frozen
encoders come on top and are kept apart. With T image tokens and L text tokens, forward, per layer of width d (h, k
heads of 64):

    self-attention    2 T (2 d 64h + 2 d 64k) + 4 T S 64h         S: tokens of an image after masking
    cross-attention   2 T 2 d 64h + 2 L 2 Y 64h + 4 T l 64h       Y: text width, l: text tokens of an image
    feed-forward      2 T 2 d 4d, a sparse layer f_c times that, its router 2 T d E
"""

from __future__ import annotations

from dataclasses import dataclass

from ecdit_train.config.schema import HEAD_DIM, RunConfig
from ecdit_train.model.embed import TimestepEmbedding

KL_ENCODER_FLOPS_PER_PIXEL = 4.13e6
"""Forward of the encoder half of the usual four-level KL autoencoder (128-256-512-512 channels, 2 blocks each), per
pixel."""


@dataclass(frozen=True, kw_only=True)
class Flops:
    """FLOPs of one optimizer step over all ranks."""

    by_part: dict[str, float]
    """Model FLOPs: forward + 2 x backward."""
    attention_quadratic: float
    """Share of `by_part` that grows with the square of the sequence (scores and weighted values)."""
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
    S, L, Y, X = cfg.tokens_per_image, cfg.encoders.text.max_tokens, m.text_width, cfg.encoders.text.width
    T, TL = images * S, images * L
    sparse = 0 if cfg.moe.router == "dense" else m.layers // 2
    patch_values = m.patch**2 * cfg.encoders.image.channels
    ffn = 2.0 * T * 2 * d * m.ffn_ratio * d
    blocks = {
        "self_attention": m.layers * (2.0 * T * (2 * d * q + 2 * d * kv) + 4.0 * T * S * q),
        "cross_attention": m.layers * (2.0 * T * 2 * d * q + 2.0 * TL * 2 * Y * q + 4.0 * T * L * q),
        "dense_feed_forward": (m.layers - sparse) * ffn,
        "experts": sparse * cfg.moe.capacity_factor * ffn,
        "router": sparse * 2.0 * T * d * cfg.moe.experts,
        "modulation": m.layers * 2.0 * images * 3 * d * d,
    }
    outside = {
        # All patches are embedded; masking drops some of them afterwards.
        "embedding": 2.0
        * images
        * (cfg.patches_per_image * patch_values * d + TimestepEmbedding.FEATURES * d + d * d + Y * d),
        "text": 2.0 * TL * X * Y + m.text_refiner_layers * (2.0 * TL * 12 * Y * Y + 4.0 * TL * L * Y),
        "modulation": 2.0 * images * 8 * d * d,
        "final": 2.0 * T * d * patch_values,
    }
    by_part = {part: 3.0 * (blocks.get(part, 0.0) + outside.get(part, 0.0)) for part in {**outside, **blocks}}
    recompute = 0.0 if checkpointing == "none" else sum(blocks.values())
    quadratic = 3.0 * m.layers * 4.0 * T * (S + L) * q
    return Flops(
        by_part=dict(sorted(by_part.items())),
        attention_quadratic=quadratic,
        recompute=recompute,
        frozen_encoders=images * _encoders_per_image(cfg),
    )


def _encoders_per_image(cfg: RunConfig) -> float:
    """A T5 encoder costs 2 FLOPs per parameter and token; the KL encoder is counted per pixel."""
    text, image = cfg.encoders.text, cfg.encoders.image
    flops = 2.0 * text.parameters * text.max_tokens if text.kind == "t5" else 0.0
    return flops + (KL_ENCODER_FLOPS_PER_PIXEL * cfg.data.resolution**2 if image.kind == "kl" else 0.0)

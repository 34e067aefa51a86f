"""What the plan asks of a run's slots: router, experts, optimizer, frozen encoders. Nothing else in plan/ reads their
sections of the configuration; whoever opens a slot answers here.

Rates are per token that a sparse layer sees, or per row that an expert works on; FLOPs are those of the forward pass.
"""

from __future__ import annotations

import torch

from ecdit_train.config.schema import RunConfig
from ecdit_train.model.dit import DiT

KL_ENCODER_FLOPS_PER_PIXEL = 4.13e6
"""Forward of the encoder half of the usual four-level KL autoencoder (128-256-512-512 channels, 2 blocks each), per
pixel."""


def network(cfg: RunConfig) -> DiT:
    """The real network on the meta device: shapes without memory, a second for 97 billion parameters."""
    with torch.device("meta"):
        return DiT(cfg.model, cfg.moe, channels=latent_channels(cfg), text_features=text_features(cfg))


# --- routers and experts -----------------------------------------------------------------------------------------


def sparse_blocks(cfg: RunConfig) -> int:
    """Blocks whose feed-forward is a mixture of experts: every second one; 0 for a dense network."""
    return 0 if cfg.moe.router == "dense" else cfg.model.layers // 2


def num_experts(cfg: RunConfig) -> int:
    """Experts of one sparse block; 0 for a dense network."""
    return cfg.moe.experts if sparse_blocks(cfg) else 0


def table1_experts(cfg: RunConfig) -> int | None:
    """Experts of the paper's Table 1 column: 0 is dense, None a routing that the table does not have."""
    return num_experts(cfg) if cfg.moe.router in ("dense", "expert_choice") else None


def experts_per_token(cfg: RunConfig) -> float:
    """f_c: rows that the experts of a sparse block work on per token, on average; 0 for a dense network."""
    return cfg.moe.capacity_factor if sparse_blocks(cfg) else 0.0


def exchange_rows_per_token(cfg: RunConfig) -> float:
    """Rows of the model's width that travel to experts, and as many back, per token; 0 for a dense network."""
    return experts_per_token(cfg)


def expert_flops_per_row(cfg: RunConfig) -> float:
    """Two products, d to r d and back: 4 r d^2."""
    return 2.0 * 2 * cfg.model.width * cfg.model.ffn_ratio * cfg.model.width


def expert_hidden_units_per_row(cfg: RunConfig) -> float:
    """Width of an expert's hidden layer over d."""
    return cfg.model.ffn_ratio


def expert_kept_units_per_row(cfg: RunConfig) -> float:
    """Vectors of width d that autograd keeps for a row: itself, before and after GELU, its result, the weighted one."""
    return 1 + 2 * cfg.model.ffn_ratio + 1 + 1


def router_flops_per_token(cfg: RunConfig) -> float:
    """One product, d to E."""
    return 2.0 * cfg.model.width * num_experts(cfg)


def router_activation_bytes_per_token(cfg: RunConfig) -> float:
    """Kept by a router: affinities of 8 E, and its input in fp32 where the compute type is another."""
    return 8 * num_experts(cfg) + (4 * cfg.model.width if cfg.train.precision == "bf16" else 0)


def assignment_bytes_per_token(cfg: RunConfig) -> float:
    """Kept of who works on what: an index of 8, and the gate in fp32 before and after it, per row."""
    return 16 * experts_per_token(cfg)


# --- optimizer and average ---------------------------------------------------------------------------------------


def optimizer_state_bytes(cfg: RunConfig) -> int:
    """fp32 bytes per element held. rmsprop: mean square, and momentum where there is any; adamw: two moments."""
    return 4 if cfg.optim.kind == "rmsprop" and cfg.optim.momentum == 0 else 8


def average_bytes(cfg: RunConfig) -> int:
    """fp32 bytes per element held of the moving average; 0 when it is off."""
    return 4 if cfg.optim.ema_decay > 0 else 0


# --- frozen encoders ---------------------------------------------------------------------------------------------


def latent_channels(cfg: RunConfig) -> int:
    return cfg.encoders.image.channels


def text_tokens(cfg: RunConfig) -> int:
    """Text tokens of an image, padding included."""
    return cfg.encoders.text.max_tokens


def text_features(cfg: RunConfig) -> int:
    """Width of the encoder's output."""
    return cfg.encoders.text.width


def encoder_parameters(cfg: RunConfig) -> int:
    """Frozen parameters, wherever they run: the paper's totals include them."""
    return cfg.encoders.text.parameters + cfg.encoders.image.parameters


def running_encoder_parameters(cfg: RunConfig) -> int:
    """Frozen parameters that lie on every rank because the encoder runs inside training."""
    text, image = cfg.encoders.text, cfg.encoders.image
    return (text.parameters if text.kind == "t5" else 0) + (image.parameters if image.kind == "kl" else 0)


def encoder_flops_per_image(cfg: RunConfig) -> float:
    """Forward of encoders that run inside training: 2 FLOPs per parameter and token of T5, the KL encoder per pixel."""
    text, image = cfg.encoders.text, cfg.encoders.image
    flops = 2.0 * text.parameters * text.max_tokens if text.kind == "t5" else 0.0
    return flops + (KL_ENCODER_FLOPS_PER_PIXEL * cfg.data.resolution**2 if image.kind == "kl" else 0.0)

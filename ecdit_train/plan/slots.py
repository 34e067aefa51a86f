"""What the plan asks of a run's slots: router, experts, optimizer, frozen encoders. Nothing else in plan/ reads their
sections of the configuration; whoever opens a slot answers here.

Rates are per token that a sparse layer sees, or per row that an expert works on; FLOPs are those of the forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ecdit_train.config.schema import RunConfig
from ecdit_train.config.slots import Held, Message, RouterSizes
from ecdit_train.model.dit import DiT

EXPERT_CHOICE = "ecdit_train.model.routers.expert_choice.ExpertChoice"
"""The router of the paper's Table 1."""

COMPUTE_BYTES = {"fp32": 4, "bf16": 2}


def network(cfg: RunConfig) -> DiT:
    """The real network on the meta device: shapes without memory, a second for 97 billion parameters."""
    with torch.device("meta"):
        return DiT(cfg.model, cfg.moe, channels=latent_channels(cfg), text_features=text_features(cfg))


# --- routers and experts -----------------------------------------------------------------------------------------


def sparse_blocks(cfg: RunConfig) -> int:
    """Blocks whose feed-forward is a mixture of experts; 0 for a dense network."""
    return len(cfg.sparse_layers)


def num_experts(cfg: RunConfig) -> int:
    """Experts of one sparse block; 0 for a dense network."""
    return cfg.moe.num_experts if sparse_blocks(cfg) else 0


def table1_experts(cfg: RunConfig) -> int | None:
    """Experts of the paper's Table 1 column: 0 is dense, None a routing that the table does not have."""
    return num_experts(cfg) if cfg.moe.router is None or cfg.moe.router.target() == EXPERT_CHOICE else None


def experts_per_token(cfg: RunConfig) -> float:
    """f_c: rows that the experts of a sparse block work on per token, on average; 0 for a dense network. A static cap is
    what is computed, filled or not."""
    if cfg.moe.router is None:
        return 0.0
    rows = cfg.moe.router.experts_per_token()
    cap = cfg.moe.dispatcher.cap if cfg.moe.dispatcher and cfg.capacity is None else None
    return rows if cap is None else min(rows * cap, float(cfg.moe.num_experts))


def exchange_rows_per_token(cfg: RunConfig) -> float:
    """Rows of the model's width that travel to experts, and as many back, per token; 0 for a dense network."""
    return experts_per_token(cfg)


def expert_flops_per_row(cfg: RunConfig) -> float:
    """Forward FLOPs of one row, as the experts say."""
    experts = cfg.moe.experts
    return experts.flops_per_row(width=cfg.model.width, hidden=_hidden(cfg)) if experts else 0.0


def expert_hidden_units_per_row(cfg: RunConfig) -> float:
    """Width of an expert's hidden layer over d."""
    return cfg.expert_ratio


def expert_kept_units_per_row(cfg: RunConfig) -> float:
    """Vectors of width d that autograd keeps for a row: itself, what the experts say, the weighted result."""
    experts = cfg.moe.experts
    if experts is None:
        return 0.0
    return 1 + experts.kept_values_per_row(width=cfg.model.width, hidden=_hidden(cfg)) / cfg.model.width + 1


def rows_are_fixed(cfg: RunConfig) -> bool:
    """Whether experts take a number of rows that is known beforehand: what travels in parts, by nodes, or is worked on leanly."""
    return cfg.capacity is not None or cfg.moe.dispatcher is None or cfg.moe.dispatcher.cap is not None


def form(cfg: RunConfig) -> str:
    """How sparse layers are carried out: `moe.form`, where the number of rows is fixed; else the plain way."""
    return cfg.moe.form if rows_are_fixed(cfg) else "plain"


def forms(cfg: RunConfig) -> tuple[str, ...]:
    """Those that there are, the one that keeps least last."""
    lean = cfg.moe.experts is not None and cfg.moe.experts.lean and rows_are_fixed(cfg)
    return ("plain", "lean") if lean else ("plain",)


def expert_lean_units_per_row(cfg: RunConfig) -> float:
    """The same in the lean form, where no exchange brings the row."""
    experts = cfg.moe.experts
    return experts.lean_values_per_row(width=cfg.model.width, hidden=_hidden(cfg)) / cfg.model.width if experts else 0.0


def expert_first_units_per_row(cfg: RunConfig) -> float:
    """Results of a row's first products, before the activation: the FLOPs without the last product's."""
    values = expert_flops_per_row(cfg) / (2.0 * cfg.model.width) - _hidden(cfg)
    return values / cfg.model.width


def expert_first_matrices(cfg: RunConfig) -> int:
    """Matrices of an expert before its last one, by the FLOPs of a row; all of the hidden width."""
    return round(expert_flops_per_row(cfg) / (2.0 * cfg.model.width * _hidden(cfg))) - 1 if _hidden(cfg) else 0


def router_flops_per_token(cfg: RunConfig) -> float:
    """As the router says."""
    router = cfg.moe.router
    return router.flops_per_token(router_sizes(cfg)) if router else 0.0


def router_activation_bytes_per_token(cfg: RunConfig) -> float:
    """As the router says."""
    router = cfg.moe.router
    if router is None:
        return 0.0
    size = COMPUTE_BYTES[cfg.train.compute]
    return router.kept_bytes_per_token(router_sizes(cfg), compute_bytes=size)


def router_messages(cfg: RunConfig, *, ranks: int) -> tuple[Message, ...]:
    """What a sparse block's router sends among the data-parallel ranks in one forward pass, as it says."""
    router = cfg.moe.router
    return router.messages(router_sizes(cfg), image_tokens=cfg.tokens_per_image, ranks=ranks) if router else ()


def router_sizes(cfg: RunConfig) -> RouterSizes:
    """As the network builds its routers for."""
    return RouterSizes(
        width=cfg.model.width,
        num_experts=cfg.moe.num_experts,
        patch_values=cfg.model.patch**2 * latent_channels(cfg),
    )


def shared_parameters(cfg: RunConfig) -> int:
    """Parameters of a sparse block's shared experts, which every token passes; 0 where there are none."""
    experts = cfg.moe.experts
    if experts is None or not cfg.moe.shared_experts:
        return 0
    return experts.shared_matrices * cfg.model.width * cfg.moe.shared_experts * _hidden(cfg)


def shared_matrices(cfg: RunConfig) -> int:
    """Matrices of the shared experts' feed-forward, the last one back to the model's width."""
    return cfg.moe.experts.shared_matrices if cfg.moe.experts else 0


def _hidden(cfg: RunConfig) -> int:
    return round(cfg.expert_ratio * cfg.model.width)


def assignment_bytes_per_token(cfg: RunConfig) -> float:
    """Kept of who works on what: an index of 8, and the gate in fp32 before and after it, per row."""
    return 16 * experts_per_token(cfg)


# --- optimizer and average ---------------------------------------------------------------------------------------


def optimizer_state_bytes(cfg: RunConfig, name: str, shape: tuple[int, ...]) -> float:
    """Bytes per element held of a parameter, as the optimizer says."""
    return cfg.optim.optimizer.state_bytes(name, shape)


def optimizer_flops(cfg: RunConfig, held: Sequence[Held], *, world: int) -> float:
    """Of matrix products in an update on the busiest rank, as the optimizer says."""
    return cfg.optim.optimizer.step_flops(held, world=world)


def optimizer_exchange(cfg: RunConfig, held: Sequence[Held], *, world: int) -> tuple[int, float]:
    """All-to-alls of an update among all ranks: calls, and bytes of rank 0's buffers, as the optimizer says."""
    return cfg.optim.optimizer.step_traffic(held, world=world)


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


def latent_bytes(cfg: RunConfig) -> int:
    """Of one image's latent on the device, fp32; where images have several sizes, of the largest."""
    factor = cfg.encoders.image.factor
    sides = [(bucket.height // factor, bucket.width // factor) for bucket in cfg.data.buckets.values()]
    return 4 * latent_channels(cfg) * max(high * wide for high, wide in (*sides, (cfg.latent_side, cfg.latent_side)))


def text_bytes(cfg: RunConfig) -> int:
    """Of one image's text features on the device, and their mask."""
    on_gpu = cfg.cluster.gpu != "cpu"
    each = cfg.encoders.text.feature_bytes(encoder_bytes=COMPUTE_BYTES[cfg.train.compute] if on_gpu else 4)
    return text_tokens(cfg) * (text_features(cfg) * each + 1)


def picture_bytes(cfg: RunConfig) -> int:
    """Of one image before it is encoded: a byte for each colour."""
    sides = [(bucket.height, bucket.width) for bucket in cfg.data.buckets.values()]
    return 3 * max(high * wide for high, wide in (*sides, (cfg.data.resolution, cfg.data.resolution)))


def encoder_parameters(cfg: RunConfig) -> int:
    """Frozen parameters, wherever they run: the paper's totals include them."""
    return cfg.encoders.text.num_parameters() + cfg.encoders.image.num_parameters()


def running_encoder_parameters(cfg: RunConfig) -> int:
    """Frozen parameters that lie on every rank because the encoder runs inside training."""
    return sum(e.num_parameters() for e in (cfg.encoders.text, cfg.encoders.image) if not e.stored)


def encoder_flops_per_image(cfg: RunConfig) -> float:
    """Forward FLOPs of encoders that run inside training, as they say."""
    return cfg.encoders.text.flops_per_image() + cfg.encoders.image.flops_per_image(resolution=cfg.data.resolution)

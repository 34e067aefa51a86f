"""The network, on one device, as the paper has it (sections 2 and 3.1). Parallelism is applied from outside.

Legend: B images, C channels, H W latent height and width, N patches, K kept patches, P values of a patch, D hidden
width, L text tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from ecdit_train.config.schema import HEAD_DIM, ModelConfig, MoEConfig, sparse_layers
from ecdit_train.config.slots import RouterSizes
from ecdit_train.kernels.adaln import modulated_norm

from .assignment import Assignment
from .attention import Attention
from .block import Block
from .embed import Conditioning, Prompt, Text, TextEmbedding, TimestepEmbedding, patchify, sincos_2d, take_tokens
from .feed_forward import FeedForward
from .lean import lean
from .moe import MoE, plain
from .router import Router


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the network says about a batch."""

    patches_BKP: Tensor
    """Velocity or data (the network does not know which) at the patches it saw."""
    assignments: tuple[Assignment, ...]
    """One per sparse block, first to last."""

    def losses(self, of: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """The routers' auxiliary losses by name, summed over layers. `of`: the network's loss of a prediction (B, K, P), for
        layers that make one of their own."""
        total: dict[str, Tensor] = {}
        for assignment in self.assignments:
            targets = {name: w * of(y.view_as(self.patches_BKP)) for name, (w, y) in assignment.targets.items()}
            for name, loss in {**assignment.losses, **targets}.items():
                total[name] = total[name] + loss if name in total else loss
        return total


class DiT(nn.Module):
    def __init__(self, model: ModelConfig, moe: MoEConfig, *, channels: int, text_features: int) -> None:
        super().__init__()
        D = model.width
        self.patch = model.patch
        patch_values = model.patch * model.patch * channels
        self.patch_embed = nn.Linear(patch_values, D)
        self.timestep = TimestepEmbedding(D)
        self.text = TextEmbedding(
            text_features, width=model.text_width, layers=model.text_refiner_layers, head_dim=HEAD_DIM
        )
        self.pooled_text = nn.Linear(model.text_width, D)
        self.shared_modulation = nn.Linear(D, 6 * D) if model.modulation == "shared" else None
        self.blocks = nn.ModuleList(
            make_block(model, moe, number=n, patch_values=patch_values) for n in range(1, model.layers + 1)
        )
        self.final_modulation = nn.Linear(D, 2 * D)
        self.final = nn.Linear(D, patch_values)

    def forward(
        self, latents_BCHW: Tensor, *, t_B: Tensor, text: Text | Prompt, keep_BK: Tensor | None, group_tokens: int
    ) -> Prediction:
        """latents: noisy x_t; t: fp32 in [0, 1]; keep: patches to look at, ascending, or None for all of them;
        `group_tokens`: tokens that compete for an expert. `text`: with a Prompt, what depends on the text alone is not done again;
        the same bits. Activations take the type of the weights."""
        dtype = self.patch_embed.weight.dtype
        x = self.patch_embed(patchify(latents_BCHW, patch=self.patch).to(dtype))
        high, wide = (size // self.patch for size in latents_BCHW.shape[2:])
        x = x + sincos_2d(high, wide, x.shape[-1], device=x.device).to(dtype)
        if keep_BK is not None:
            x = take_tokens(x, keep_BK)
        c = self.condition(t_B, text)
        assignments = []
        known = text.blocks if isinstance(text, Prompt) else [None] * len(self.blocks)
        for block, keys_values in zip(self.blocks, known, strict=True):
            own = replace(c, text_BLY=keys_values) if isinstance(text, Prompt) else c
            x, assignment = block(x, own, group_tokens=group_tokens)
            if assignment is not None:
                assignments.append(assignment)
        shift, scale = self.final_modulation(c.vector_BD).chunk(2, dim=-1)
        patches = self.final(modulated_norm(x, shift_BD=shift, scale_BD=scale))
        return Prediction(patches_BKP=patches, assignments=tuple(assignments))

    @property
    def routers(self) -> list[Router]:
        """Of the sparse blocks, first to last."""
        return [block.feed_forward.router for block in self.blocks if isinstance(block.feed_forward, MoE)]

    def prompt(self, text: Text) -> Prompt:
        """The work on the text that all steps of a sampler share: refiner, pooled text, every block's keys and values. FSDP takes
        it for a forward pass (`parallel.drawing`)."""
        text_BLY, mask_BL, pooled_BY = self.text(text)
        blocks = tuple(cast(Block, block).keys_values(text_BLY) for block in self.blocks)
        return Prompt(mask_BL=mask_BL, pooled_BD=self.pooled_text(pooled_BY), blocks=blocks)

    def condition(self, t_B: Tensor, text: Text | Prompt) -> Conditioning:
        text_BLY: Tensor | None = None  # each block is given its own keys and values
        if isinstance(text, Prompt):
            mask_BL, pooled_BD = text.mask_BL, text.pooled_BD
        else:
            text_BLY, mask_BL, pooled_BY = self.text(text)
            pooled_BD = self.pooled_text(pooled_BY)
        timestep = self.timestep(t_B)
        vector = F.silu(timestep + pooled_BD)
        shared = self.shared_modulation
        return Conditioning(
            text_BLY=text_BLY,
            text_mask_BL=mask_BL,
            vector_BD=vector,
            timestep_BD=timestep,
            shared_B6D=None if shared is None else shared(vector).unflatten(-1, (6, -1)),
        )


def make_block(model: ModelConfig, moe: MoEConfig, *, number: int, patch_values: int) -> Block:
    D = model.width
    sparse = moe.router is not None and number in sparse_layers(model.layers, which=moe.layers)
    cross_attention = None
    if model.cross_attention:
        cross_attention = Attention(
            D, context_width=model.text_width, heads=model.heads, kv_heads=model.heads, head_dim=HEAD_DIM
        )
    return Block(
        D,
        self_attention=Attention(D, context_width=D, heads=model.heads, kv_heads=model.kv_heads, head_dim=HEAD_DIM),
        cross_attention=cross_attention,
        feed_forward=make_moe(model, moe, patch_values=patch_values)
        if sparse
        else FeedForward(D, hidden=model.ffn_ratio * D),
        modulations=3 if model.modulation == "shared" else 6,
    )


def make_moe(model: ModelConfig, moe: MoEConfig, *, patch_values: int) -> MoE:
    assert moe.router is not None
    assert moe.experts is not None
    assert moe.dispatcher is not None
    D, E = model.width, moe.num_experts
    router = moe.router.build(RouterSizes(width=D, num_experts=E, patch_values=patch_values))
    hidden = round((model.ffn_ratio if moe.expert_ratio is None else moe.expert_ratio) * D)
    experts = moe.experts.build(width=D, hidden=hidden, num_experts=E)
    dispatcher = moe.dispatcher.build()
    dispatcher.cap = moe.dispatcher.cap
    shared = moe.experts.build_shared(width=D, hidden=moe.shared_experts * hidden) if moe.shared_experts else None
    form = {"plain": plain, "lean": lean}[moe.form]
    return MoE(router, experts, dispatcher=dispatcher, shared=shared, form=form)  # type: ignore[arg-type]

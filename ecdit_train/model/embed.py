"""From latents to tokens and back: patches, positions, timesteps and text.

Legend: B images, C channels, H W latent height and width, N patches of a whole image, K kept patches, P = patch * patch
* C values of a patch, D hidden width, L text tokens, X width of the frozen text features, Y text width inside the
model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .attention import Attention, KeysValues
from .feed_forward import FeedForward


def patchify(image_BCHW: Tensor, *, patch: int) -> Tensor:
    """(B, C, H, W) to (B, N, P), patches in row order."""
    return rearrange(image_BCHW, "b c (h p) (w q) -> b (h w) (p q c)", p=patch, q=patch)


def unpatchify(patches_BNP: Tensor, *, patch: int, side: int) -> Tensor:
    """(B, N, P) back to (B, C, H, W) with `side` patches in a column."""
    return rearrange(patches_BNP, "b (h w) (p q c) -> b c (h p) (w q)", h=side, p=patch, q=patch)


def take_tokens(x_BNX: Tensor, keep_BK: Tensor) -> Tensor:
    """Keep the tokens whose indices are given: (B, N, X), (B, K) -> (B, K, X)."""
    return x_BNX.gather(1, keep_BK[:, :, None].expand(-1, -1, x_BNX.shape[-1]))


def sincos_2d(high: int, wide: int, width: int, *, device: torch.device) -> Tensor:
    """Fixed 2-D sine-cosine positions (ViT, DiT) of `high` rows of `wide` patches: (high * wide, width) float32; half of the
    width per axis. A place means the same in any aspect and resolution: they have no weights."""
    quarter = width // 4
    omega = torch.exp(-math.log(10000.0) * torch.arange(quarter, device=device, dtype=torch.float32) / quarter)
    angle = torch.arange(max(high, wide), device=device, dtype=torch.float32)[:, None] * omega
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)
    rows = axis[:high, None, :].expand(high, wide, -1)
    cols = axis[None, :wide, :].expand(high, wide, -1)
    return torch.cat([rows, cols], dim=-1).reshape(high * wide, -1)


class TimestepEmbedding(nn.Module):
    """Two-layer MLP of width D over sine-cosine features of t in [0, 1] (paper section 2.3)."""

    FEATURES = 256

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(self.FEATURES, width)
        self.down = nn.Linear(width, width)

    def forward(self, t_B: Tensor) -> Tensor:
        """t: (B,) float32 in [0, 1]. Returns (B, D). Features are fp32: bf16 cannot tell two near timesteps apart."""
        half = self.FEATURES // 2
        omega = torch.exp(-math.log(10000.0) * torch.arange(half, device=t_B.device, dtype=torch.float32) / half)
        angle = 1000.0 * t_B.float()[:, None] * omega
        features = torch.cat([angle.cos(), angle.sin()], dim=1).to(self.up.weight.dtype)
        return self.down(F.silu(self.up(features)))


@dataclass(frozen=True, kw_only=True)
class Text:
    """Frozen text features of a batch.

    features_BLX: any float type; mask_BL: True at real tokens; drop_B: True where the null text takes the caption's
    place (caption dropout in training, the unconditional half of guidance).
    """

    features_BLX: Tensor
    mask_BL: Tensor
    drop_B: Tensor


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """What a block reads beside its tokens."""

    text_BLY: Tensor | KeysValues | None
    """Or the keys and values that one block's cross-attention made of it; None for a block that has none."""
    text_mask_BL: Tensor
    vector_BD: Tensor
    """Timestep plus pooled text, after SiLU."""
    timestep_BD: Tensor
    """The timestep alone."""
    shared_B6D: Tensor | None
    """The modulation that all blocks share: shift, scale, gate of self-attention, then of the feed-forward; None where
    each has its own."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """All that the network makes of a text alone, whatever the timestep and the picture: `DiT.prompt`.

    It holds 2 * layers * B * L * D numbers of keys and values: 6.3 GB in bf16 for 64 guided pictures of 3XL, 128 text tokens.
    """

    mask_BL: Tensor
    pooled_BD: Tensor
    blocks: tuple[KeysValues | None, ...]
    """For each block's cross-attention; None where it has none."""


class RefinerLayer(nn.Module):
    """A plain pre-norm transformer layer over the text."""

    def __init__(self, width: int, *, head_dim: int) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(width)
        self.attention = Attention(
            width, context_width=width, heads=width // head_dim, kv_heads=width // head_dim, head_dim=head_dim
        )
        self.norm_feed_forward = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, hidden=4 * width)

    def forward(self, x_BLY: Tensor, mask_BL: Tensor) -> Tensor:
        h = self.norm_attention(x_BLY)
        x_BLY = x_BLY + self.attention(h, context=h, mask_BL=mask_BL)
        return x_BLY + self.feed_forward(self.norm_feed_forward(x_BLY))


class TextEmbedding(nn.Module):
    """Projects frozen text features, puts the null text where a caption is dropped, refines."""

    def __init__(self, features: int, *, width: int, layers: int, head_dim: int) -> None:
        super().__init__()
        self.project = nn.Linear(features, width)
        self.null = nn.Parameter(torch.empty(width))
        self.layers = nn.ModuleList(RefinerLayer(width, head_dim=head_dim) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, text: Text) -> tuple[Tensor, Tensor, Tensor]:
        """Returns text (B, L, Y), its mask (B, L) and the mean over real tokens (B, Y)."""
        x = self.project(text.features_BLX.to(self.project.weight.dtype))
        first_L = torch.arange(x.shape[1], device=x.device) == 0
        x = torch.where(text.drop_B[:, None, None], self.null.to(x.dtype), x)
        # The first token is always real, so that no softmax ever runs over an empty set.
        mask = torch.where(text.drop_B[:, None], first_L, text.mask_BL | first_L)
        for layer in self.layers:
            x = layer(x, mask)
        x = self.norm(x)
        weight = mask.to(x.dtype)[:, :, None]
        return x, mask, (x * weight).sum(1) / weight.sum(1)

"""Frozen encoders behind two protocols: text to features, images to latents and back. One file each with its configuration.

Real encoders come from local folders only (safetensors, no network, no code from the folder); the built-in
ones need no files.

Legend: B images, L text tokens, X feature width, C latent channels, H W latent height and width, S pixels per side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


class TextEncoder(Protocol):
    width: int

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Features (B, L, X) and mask (B, L), True at real tokens. L is the configured maximum: static shapes."""
        ...


MAX_WORDS = 20_000
"""Words of captions that a run keeps; a set with more of them is nothing for an encoder that knows no word by itself."""


@runtime_checkable
class KnowsWords(Protocol):
    """A text encoder that knows nothing of a word before training has shown it: who draws is told of others."""

    def words(self, caption: str) -> list[str]:
        """The words of a caption that reach the network."""
        ...


class ImageCodec(Protocol):
    channels: int

    def encode(self, images_BSS3: Tensor) -> Tensor:
        """uint8 (B, S, S, 3) to latents (B, C, H, W) fp32, shifted and scaled to about unit variance."""
        ...

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Latents back to uint8 (B, S, S, 3)."""
        ...


def to_uint8(x_BCSS: Tensor) -> Tensor:
    """(B, C, S, S) in [-1, 1] to uint8 (B, S, S, C)."""
    return ((x_BCSS + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()

"""Pixels as they are, in [-1, 1].

Legend: B images, C = 3 channels, S pixels per side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ecdit_train.config.rules import Checker
from ecdit_train.config.schema import RunConfig
from ecdit_train.config.slots import ImageCodecConfig

from . import to_uint8


@dataclass(frozen=True, kw_only=True)
class Identity(ImageCodecConfig):
    """RGB pixels in [-1, 1], shifted and scaled."""

    channels: ClassVar[int] = 3
    factor: ClassVar[int] = 1
    scale: float
    """latent = (pixels - shift) * scale."""
    shift: float
    """Mean of the pixels."""

    def check(self, run: RunConfig, check: Checker, *, key: str) -> None:
        check.positive([f"{key}.scale"])

    def build(self, *, device: torch.device | str, dtype: torch.dtype) -> IdentityCodec:
        return IdentityCodec(self)


class IdentityCodec:
    channels = 3

    def __init__(self, config: Identity) -> None:
        self.scale, self.shift = config.scale, config.shift

    def encode(self, images_BSS3: Tensor) -> Tensor:
        x = images_BSS3.permute(0, 3, 1, 2).float() / 127.5 - 1.0
        return (x - self.shift) * self.scale

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        return to_uint8(latents_BCHW.float() / self.scale + self.shift)

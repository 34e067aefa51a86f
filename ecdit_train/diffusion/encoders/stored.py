"""Features and latents that were computed beforehand and lie in the shards: nothing runs in training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ecdit_train.config.rules import Checker
from ecdit_train.config.schema import RunConfig
from ecdit_train.config.slots import ImageCodecConfig, TextEncoderConfig

from .kl import KLCodec


@dataclass(frozen=True, kw_only=True)
class StoredText(TextEncoderConfig):
    """Text embeddings stored in the shards; to draw pictures, name the encoder that made them."""

    stored: ClassVar[bool] = True
    width: int
    """Channels of a stored feature."""
    max_tokens: int
    """Tokens per caption; longer ones are cut."""
    parameters: int
    """Frozen parameters of the encoder that made them, for the plan's totals (the paper counts 670M)."""

    def num_parameters(self) -> int:
        return self.parameters

    def feature_bytes(self, *, encoder_bytes: int) -> int:
        """As `ecdit data encode` writes them: float16."""
        return 2

    def check(self, run: RunConfig, check: Checker, *, key: str) -> None:
        check.at_least(0, [f"{key}.parameters"])

    def build(self, *, device: torch.device | str, dtype: torch.dtype) -> None:
        return None


@dataclass(frozen=True, kw_only=True)
class StoredLatents(ImageCodecConfig):
    """Latents stored in the shards, as the codec gave them: shift and scale are applied here."""

    stored: ClassVar[bool] = True
    path: str | None
    """Folder of the AutoencoderKL that made them, to decode pictures with; null: nothing is drawn."""
    channels: int
    """Channels of the latent."""
    factor: int
    """Pixels per latent, each way."""
    scale: float
    """latent = (stored - shift) * scale; 1 / standard deviation of the stored latents is a good scale."""
    shift: float
    """Mean of the stored latents."""
    parameters: int
    """Frozen parameters of the codec that made them, for the plan's totals (the paper counts the encoder's 34M)."""

    def num_parameters(self) -> int:
        return self.parameters

    def paths(self) -> tuple[str, ...]:
        return (self.path,) if self.path else ()

    def check(self, run: RunConfig, check: Checker, *, key: str) -> None:
        check.positive([f"{key}.scale"])
        check.at_least(0, [f"{key}.parameters"])

    def build(self, *, device: torch.device | str, dtype: torch.dtype) -> KLCodec | None:
        return KLCodec(self, path=self.path, device=device, dtype=dtype) if self.path else None

"""What fills the slot `data.decoder`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ecdit_train.config.slots import DecoderConfig

if TYPE_CHECKING:
    from data_pipeline.decoders import ImageDecoder
    from ecdit_train.config.rules import Checker
    from ecdit_train.config.schema import RunConfig


@dataclass(frozen=True, kw_only=True)
class Turbo(DecoderConfig):
    """libjpeg-turbo for JPEG, OpenCV for the others, straight into the batch: the reference."""

    def build(self) -> ImageDecoder:
        from data_pipeline.decoders import PlainDecoder

        return PlainDecoder()


@dataclass(frozen=True, kw_only=True)
class Dali(DecoderConfig):
    """NVIDIA DALI decodes and resizes JPEG, the reference all others."""

    device: Literal["cpu", "mixed"]
    """cpu, or mixed: nvJPEG on each rank's GPU; pixels come back to the host, where batches are made."""
    at_once: int
    """Pictures of one call."""

    def check(self, run: RunConfig, check: Checker, *, key: str) -> None:
        check.positive([f"{key}.at_once"])

    def build(self) -> ImageDecoder:
        from data_pipeline.dali import DaliDecoder

        return DaliDecoder(device=self.device, device_id=int(os.environ.get("LOCAL_RANK", 0)), at_once=self.at_once)

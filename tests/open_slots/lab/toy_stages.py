"""Stages of one's own: some pictures are mirrored, and their captions say so."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ecdit_train.config.rules import Checker
from ecdit_train.config.schema import RunConfig
from ecdit_train.config.slots import StagesConfig


@dataclass(frozen=True, kw_only=True)
class Mirrored(StagesConfig):
    """Some pictures, left for right."""

    share: float
    """Of the samples."""

    def check(self, run: RunConfig, check: Checker, *, key: str) -> None:
        check.share([f"{key}.share"])

    def build(self) -> list[Any]:
        return [self.mirror]

    def mirror(self, samples: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for sample in samples:
            if np.random.default_rng(sample["__position__"]).random() < self.share:
                pixels = np.asarray(Image.open(io.BytesIO(sample["png"])).convert("RGB"))
                sample |= {"png": np.ascontiguousarray(pixels[:, ::-1]), "txt": sample["txt"].decode() + ", mirrored"}
            yield sample

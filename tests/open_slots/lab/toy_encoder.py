"""A text encoder of one's own: each letter is a one-hot vector.

Legend: B captions, L text tokens, X feature width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ecdit_train.config.slots import TextEncoderConfig


@dataclass(frozen=True, kw_only=True)
class Letters(TextEncoderConfig):
    """One-hot letters."""

    width: int
    """Letters that are told apart."""
    max_tokens: int
    """Letters per caption; longer captions are cut."""

    def build(self, *, device: torch.device | str, dtype: torch.dtype) -> LetterEncoder:
        return LetterEncoder(self, device=device)


class LetterEncoder:
    def __init__(self, config: Letters, *, device: torch.device | str) -> None:
        self.width, self.max_tokens, self.device = config.width, config.max_tokens, device

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        features = torch.zeros(len(captions), self.max_tokens, self.width)
        mask = torch.zeros(len(captions), self.max_tokens, dtype=torch.bool)
        for row, caption in enumerate(captions):
            for place, letter in enumerate(caption[: self.max_tokens]):
                features[row, place, ord(letter) % self.width] = 1.0
                mask[row, place] = True
        return features.to(self.device), mask.to(self.device)

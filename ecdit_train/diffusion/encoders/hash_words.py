"""Text without a network: a fixed vector for each word.

Legend: B captions, L text tokens, X feature width.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ecdit_train import keyed
from ecdit_train.config.slots import TextEncoderConfig


@dataclass(frozen=True, kw_only=True)
class HashWords(TextEncoderConfig):
    """Each word gets a fixed vector; no download, no files."""

    width: int
    """Channels of a feature."""
    max_tokens: int
    """Words per caption; longer captions are cut."""

    def build(self, *, device: torch.device | str, dtype: torch.dtype) -> HashTextEncoder:
        return HashTextEncoder(width=self.width, max_tokens=self.max_tokens, device=device)


class HashTextEncoder:
    """Each word gets a fixed unit-variance vector keyed by its CRC-32, plus a weak position code:
    small, frozen, no files."""

    def __init__(self, *, width: int, max_tokens: int, device: torch.device | str = "cpu") -> None:
        self.width, self.max_tokens, self.device = width, max_tokens, device
        place = torch.arange(max_tokens)[:, None] / 10000.0 ** (torch.arange(0, width, 2) / width)
        self._position_LX = 0.3 * torch.cat([place.sin(), place.cos()], dim=1)[:, :width]
        self._words: dict[str, Tensor] = {}

    def _vector(self, word: str) -> Tensor:
        if word not in self._words:
            key = torch.tensor([zlib.crc32(word.encode())])
            self._words[word] = keyed.normal(0, keyed.Purpose.INIT, key, shape=(self.width,))[0]
        return self._words[word]

    def words(self, caption: str) -> list[str]:
        """At most `max_tokens`, in lower case."""
        return re.findall(r"\w+", caption.lower())[: self.max_tokens]

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        features = torch.zeros(len(captions), self.max_tokens, self.width)
        mask = torch.zeros(len(captions), self.max_tokens, dtype=torch.bool)
        for row, caption in enumerate(captions):
            words = self.words(caption)
            for place, word in enumerate(words):
                features[row, place] = self._vector(word) + self._position_LX[place]
            mask[row, : len(words)] = True
        return features.to(self.device), mask.to(self.device)

"""What the network trains on, on the device, and where in the data that is.

Legend: B images of one microbatch, C channels, H W latent height and width, L text tokens, X width of the frozen text features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Microbatch:
    """Encoded samples; the order of images is that of the global batch."""

    position_B: Tensor
    """Global positions of the samples in the training stream, int64; they key every random draw."""
    latents_BCHW: Tensor
    features_BLX: Tensor
    mask_BL: Tensor
    """True at real tokens."""
    captioned_B: Tensor | None = None
    """False where a sample has no caption: it is trained on as one whose caption is dropped. None: all have one."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where in the data a run is and what it met there, as of one batch: the loader may be further. This rank's."""

    counts: dict[str, int]
    """Counters since this process started, by the names of METRICS."""
    levels: dict[str, float]
    """How things stand, by the names of METRICS."""
    bad: dict[str, int]
    """Unreadable samples replaced, by kind of error."""
    words: list[str]
    """Words of captions, where the encoder knows only those that it has seen."""
    mark: Any
    """What the loader needs to say its state as of then."""


def split(batch: Microbatch, *, size: int) -> Iterator[Microbatch]:
    """A rank's share of the global batch, cut into microbatches of `size` consecutive images (whole routing groups)."""
    for start in range(0, len(batch.position_B), size):
        part = slice(start, start + size)
        yield Microbatch(
            position_B=batch.position_B[part],
            latents_BCHW=batch.latents_BCHW[part],
            features_BLX=batch.features_BLX[part],
            mask_BL=batch.mask_BL[part],
            captioned_B=None if batch.captioned_B is None else batch.captioned_B[part],
        )

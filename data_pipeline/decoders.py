"""The slot for pixels: whatever decodes and resizes the pictures of a few samples at a time.

We choose and read the bytes, a decoder fills the batch's own storage. A picture that it cannot read is an answer, not an exception:
the sample is then replaced by the rule that is the same for all decoders, ranks and threads (`filling`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from data_pipeline.decode import Payload, decode_image, place_pixels
from data_pipeline.errors import UndecodableImage, Where


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture to decode: `out` is its slot in the batch, uint8 (H, W, 3), C-contiguous."""

    payload: Payload | np.ndarray
    """The file's bytes, or pixels that a stage of the user has decoded already: uint8 (h, w, 3)."""
    out: np.ndarray
    where: Where


class ImageDecoder(Protocol):
    """Calls come from several threads at once."""

    at_once: int
    """Pictures of one call: at most so many are given."""

    fallbacks: int
    """Calls in which the reference took over."""

    def decode(self, pictures: Sequence[Picture]) -> list[UndecodableImage | None]:
        """Fills every `out`, shorter side resized and centre cut out, upright; an answer for each picture."""
        ...

    def close(self) -> None: ...


class PlainDecoder:
    """libjpeg-turbo (simplejpeg) for JPEG, OpenCV for the others: one by one, each straight into its slot. The reference."""

    at_once = 1
    fallbacks = 0

    def decode(self, pictures: Sequence[Picture]) -> list[UndecodableImage | None]:
        return [_answer(picture) for picture in pictures]

    def close(self) -> None: ...


def _answer(picture: Picture) -> UndecodableImage | None:
    try:
        if isinstance(picture.payload, np.ndarray):
            place_pixels(picture.payload, out=picture.out, where=picture.where)
        else:
            decode_image(picture.payload, out=picture.out, where=picture.where)
    except UndecodableImage as error:
        return error
    return None

"""Pixels to file bytes, and to a smaller size."""

from __future__ import annotations

import io
from typing import Any, Literal

import numpy as np

ImageFormat = Literal["png", "jpg", "npy"]
JPEG_QUALITY = 95


def encode_image(image: np.ndarray, *, image_format: ImageFormat, quality: int = JPEG_QUALITY) -> bytes:
    """uint8 (H, W, 3) RGB to file bytes; png and npy are exact."""
    if image_format == "npy":
        return npy_bytes(image)
    if image_format == "jpg":
        import simplejpeg

        return simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=quality, colorspace="RGB")
    done, png = _cv2().imencode(".png", image[:, :, ::-1])
    assert done
    return png.tobytes()


def npy_bytes(array: np.ndarray) -> bytes:
    """As `numpy.save`, never a pickle."""
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.ascontiguousarray(array), allow_pickle=False)
    return stream.getvalue()


def shorter_side(image: np.ndarray, *, side: int) -> np.ndarray:
    """The whole picture with a shorter side of `side`; uint8 (H, W, 3). Nothing is copied where it has that."""
    height, width = image.shape[:2]
    short = min(height, width)
    if short == side:
        return image
    size = (max(side, round(width * side / short)), max(side, round(height * side / short)))
    cv2 = _cv2()
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA if short > side else cv2.INTER_CUBIC)


def shrunk(image: np.ndarray, *, longest: int) -> np.ndarray:
    """The whole picture with no side above `longest`; uint8 (H, W, 3)."""
    height, width = image.shape[:2]
    if max(height, width) <= longest:
        return image
    scale = longest / max(height, width)
    return _cv2().resize(
        image, (max(1, round(width * scale)), max(1, round(height * scale))), interpolation=_cv2().INTER_AREA
    )


def grey(image: np.ndarray, *, side: int) -> np.ndarray:
    """float32 (side, side): luminance of uint8 (H, W, 3), each pixel the mean of an area."""
    cv2 = _cv2()
    small = cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)
    return cv2.cvtColor(small, cv2.COLOR_RGB2GRAY).astype(np.float32)


def _cv2() -> Any:
    import cv2

    if cv2.getNumThreads() > 1:
        cv2.setNumThreads(1)  # processes are the parallelism
    return cv2

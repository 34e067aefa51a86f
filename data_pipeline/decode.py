"""From bytes of a field to pixels, arrays and text. Image libraries are imported at first use.

Images come out as uint8 RGB, H x W x 3, at the size of their slot: resized until they cover it, centre cut out (a random crop
is a draw keyed by position and belongs to the trainer), upright as their EXIF says, transparent ones over white. Headers are
read before pixels: a 20 KB file can claim 60000 x 60000. Whatever a library raises is a fault of the sample, never the
end of a run.
"""

from __future__ import annotations

import io
import json
import math
import struct
from dataclasses import dataclass
from functools import lru_cache
from tokenize import TokenError
from typing import Any

import numpy as np

from data_pipeline.errors import BadArray, BadCaption, UndecodableImage, Where

MAX_PIXELS = 64 * 1024 * 1024
"""64 Mpx: above every honest training image."""
MAX_SHRINK = 16
"""A picture that must be decoded in full (all but JPEG, which is shrunk while it is decoded) may have this times the
wanted side, or 4096 pixels: 16 Mpx are 50 MB in each thread."""
MAX_BYTES = 64 * 1024 * 1024
"""Of one picture's file."""
BACKGROUND = 255
"""White, under transparent pixels."""

_BITS = {2: (np.int16, np.uint16, 0x7C00, 0xFC00), 4: (np.int32, np.uint32, 0x7F800000, 0xFF800000)}
"""Bytes of a float -> (signed, unsigned integer of its size, bits of plus and of minus infinity)."""

Payload = bytes | memoryview


def decode_image(payload: Payload, *, out: np.ndarray, where: Where) -> None:
    """Decode jpg, png, webp or npy (recognised by content, not by name) into `out`, uint8 (H, W, 3), C-contiguous.

    A JPEG of the right size is decoded straight into the batch buffer.

    Raises:
        UndecodableImage: damaged, of another kind, larger than `MAX_PIXELS`, `MAX_SHRINK` or `MAX_BYTES`, or without pixels.
    """
    try:
        kind, size = _claims(payload, most=max(4096, MAX_SHRINK * max(out.shape[:2])) ** 2)
        image = _decode_jpeg(payload, size=size, out=out) if kind == "jpg" else _decode_other(payload, kind)
        upright = _upright(image, orientation=_orientation(payload, kind))
        if upright is not out:
            out[...] = resize_centre(upright, height=out.shape[0], width=out.shape[1])
    except Exception as error:
        raise UndecodableImage(f"{where}: {str(error) or type(error).__name__}") from error


def place_pixels(image: np.ndarray, *, out: np.ndarray, where: Where) -> None:
    """Pixels that are decoded already, uint8 (h, w, 3), resized and cut into `out` (H, W, 3). Raises UndecodableImage."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise UndecodableImage(f"{where}: pixels of {image.shape} {image.dtype}; must be uint8 (H, W, 3)")
    out[...] = resize_centre(image, height=out.shape[0], width=out.shape[1])


def whole_jpeg(payload: Payload) -> tuple[int, int] | None:
    """(height, width) of a JPEG of honest size in grey or YCbCr with an end: what any decoder reads alike. None for others, which
    may be good all the same."""
    if not 4 < len(payload) <= MAX_BYTES or bytes(payload[:3]) != b"\xff\xd8\xff":
        return None
    import simplejpeg

    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(payload)
    except Exception:
        return None
    ends = bytes(payload[-64:]).rfind(b"\xff\xd9") >= 0
    honest = 0 < height * width <= MAX_PIXELS and colorspace in ("Gray", "YCbCr")
    return (height, width) if ends and honest else None


def resize_centre(image: np.ndarray, *, height: int, width: int) -> np.ndarray:
    """Shrunk or enlarged until it just covers (height, width), centre crop; uint8 (h, w, 3) -> (height, width, 3). Nothing is
    copied when it fits."""
    high, wide = image.shape[:2]
    if not (high == height and wide >= width) and not (wide == width and high >= height):
        cv2 = _cv2()
        ratio = max(height / high, width / wide)
        size = (max(width, round(wide * ratio)), max(height, round(high * ratio)))
        # AREA averages all source pixels (no aliasing) when shrinking; it degrades to nearest when enlarging.
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA if ratio < 1 else cv2.INTER_CUBIC)
        high, wide = image.shape[:2]
    top, left = (high - height) // 2, (wide - width) // 2
    return image[top : top + height, left : left + width]


def decode_upright(payload: Payload, *, least: int | None, where: Where) -> Upright:
    """A whole picture by the rules of `decode_image`, for those who prepare data: any size up to `MAX_PIXELS`.

    `least`: a JPEG may be shrunk while it is decoded, its shorter side not below twice this. None: never.

    Raises:
        UndecodableImage: as `decode_image`.
    """
    try:
        kind, size = _claims(payload, most=MAX_PIXELS)
        if kind == "jpg":
            import simplejpeg

            bound = {} if least is None else {"min_height": 2 * least, "min_width": 2 * least}
            image = simplejpeg.decode_jpeg(payload, colorspace="RGB", **bound)
        else:
            image = _decode_other(payload, kind)
        turn = _orientation(payload, kind)
        size = size[::-1] if turn >= 5 else size
        return Upright(pixels=_upright(image, orientation=turn), size=size, kind=kind, turned=turn != 1)
    except Exception as error:
        raise UndecodableImage(f"{where}: {str(error) or type(error).__name__}") from error


def upright_size(payload: Payload, *, where: Where) -> tuple[int, int]:
    """(height, width) of a picture from its headers alone, upright. Raises UndecodableImage."""
    try:
        kind = _kind(payload)
        height, width = _size(payload, kind)
        return (width, height) if _orientation(payload, kind) >= 5 else (height, width)
    except Exception as error:
        raise UndecodableImage(f"{where}: {str(error) or type(error).__name__}") from error


@dataclass(frozen=True, kw_only=True)
class Upright:
    """`pixels` uint8 (H, W, 3); `size` (height, width) before it was shrunk, upright."""

    pixels: np.ndarray
    size: tuple[int, int]
    kind: str
    """jpg, png, webp or npy, by its content"""
    turned: bool


def _claims(payload: Payload, *, most: int) -> tuple[str, tuple[int, int]]:
    """Kind, and (height, width), of what is honest in bytes and pixels; `most` pixels of one that must be
    decoded in full. ValueError."""
    if len(payload) > MAX_BYTES:
        raise ValueError(f"{len(payload)} bytes; allowed: {MAX_BYTES}")
    kind = _kind(payload)
    height, width = _size(payload, kind)
    most = MAX_PIXELS if kind == "jpg" else min(MAX_PIXELS, most)
    if kind == "png" and payload[24] == 16:
        most //= 2  # a sample of two bytes
    if not 0 < height * width <= most:
        raise ValueError(f"{height} x {width} pixels; allowed for {kind}: 1 to {most}")
    return kind, (height, width)


def _decode_other(payload: Payload, kind: str) -> np.ndarray:
    """All but JPEG."""
    if kind == "npy":
        return _decode_pixels(payload)
    if kind == "png":
        _check_chunks(payload)
    return _decode_opencv(payload)


def _orientation(payload: Payload, kind: str) -> int:
    """1 to 8 as in EXIF's tag 274; 1 is upright, and what a file says that says nothing."""
    # Looked for before it is parsed, since parsing costs more than decoding a small picture.
    if kind == "jpg":
        if not _has_exif(payload):
            return 1
    elif kind not in (marks := {"png": b"eXIf", "webp": b"EXIF"}) or (
        bytes(payload if kind == "webp" else payload[:65536]).find(marks[kind]) < 0
    ):
        return 1
    from PIL import Image

    try:
        with Image.open(io.BytesIO(payload)) as image:
            found = image.getexif().get(274, 1)
    except Exception:  # the pixels may be good all the same
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def _has_exif(payload: Payload) -> bool:
    """Whether a JPEG holds EXIF in front of its pixels: its segments say so, without a search of all bytes."""
    at, end = 2, len(payload)
    while at + 10 <= end and payload[at] == 0xFF and payload[at + 1] >= 0xC0:
        kind = payload[at + 1]
        if kind == 0xDA:  # pixels
            return False
        if kind == 0xE1 and bytes(payload[at + 4 : at + 10]) == b"Exif\0\0":
            return True
        at += 2 + (payload[at + 2] << 8 | payload[at + 3])
    return bytes(payload[:65536]).find(b"Exif\0\0") >= 0  # no segment where one must be: decoders look further, too


def _upright(image: np.ndarray, *, orientation: int) -> np.ndarray:
    """(H, W, 3) -> (H, W, 3), or (W, H, 3) where the camera was held sideways. The same array where nothing is to be done."""
    if orientation == 1:
        return image
    turned = image.transpose(1, 0, 2) if orientation >= 5 else image
    rows = -1 if orientation in (3, 4, 7, 8) else 1
    columns = -1 if orientation in (2, 3, 6, 7) else 1
    return np.ascontiguousarray(turned[::rows, ::columns])


def decode_array(payload: Payload | np.ndarray, *, where: Where) -> np.ndarray:
    """A float16 or float32 array from npy bytes: a read-only view of the payload, never a pickle. An array is checked, too.

    Raises:
        BadArray: not npy, another dtype, wrong number of bytes, or a value that is not finite.
    """
    try:
        array = payload if isinstance(payload, np.ndarray) else _npy(payload)
    except ValueError as error:
        raise BadArray(f"{where}: {error}") from error
    if array.dtype not in (np.float16, np.float32):
        raise BadArray(f"{where}: dtype {array.dtype}; allowed: float16, float32")
    if not all_finite(array):
        raise BadArray(f"{where}: holds NaN or infinity")
    return array


def all_finite(array: np.ndarray) -> bool:
    """Whether a float16 or float32 array holds neither NaN nor infinity."""
    # Those have all exponent bits set, so as integers they are the largest: of those without a sign bit when read as signed, of
    # those with one when read as unsigned. Two passes without a copy; np.isfinite takes ten times as long for float16.
    bits, most = array.ravel("K"), np.maximum.reduce  # as ndarray.max, without its wrapper
    signed, unsigned, plus, minus = _BITS[array.dtype.itemsize]
    return not bits.size or bool(most(bits.view(signed)) < plus and most(bits.view(unsigned)) < minus)


def decode_caption(payload: Payload | str | dict, *, suffix: str, where: Where) -> str:
    """`read_caption` where there must be one. Raises BadCaption."""
    if (found := read_caption(payload, source=suffix, where=where)) is None:
        raise BadCaption(f"{where}: caption is empty or no text")
    return found


def read_caption(payload: Payload | str | dict, *, source: str, where: Where) -> str | None:
    """Caption of a txt member, or of a json member the string under a key (`json:KEY`; `caption` where none is named),
    outer white space removed. None where there is none: an empty text, null, no such key.

    Raises:
        BadCaption: not strict UTF-8, not JSON, or no text under the key.
    """
    field, _, key = source.partition(":")
    try:
        text: Any = payload if isinstance(payload, str | dict) else str(payload, "utf-8")
        if field.endswith("json"):
            text = (json.loads(text) if isinstance(text, str) else text).get(key or "caption")
    except UnicodeDecodeError as error:
        raise BadCaption(f"{where}: caption is not UTF-8 (byte {error.start}: {error.reason})") from error
    except (ValueError, AttributeError, RecursionError) as error:
        raise BadCaption(f"{where}: unreadable json ({type(error).__name__}: {str(error)[:200]})") from error
    if text is not None and not isinstance(text, str):
        raise BadCaption(f"{where}: {source} is {type(text).__name__} instead of text")
    return (text or "").strip() or None


def _kind(payload: Payload) -> str:
    head = bytes(payload[:16])
    if head.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    if head.startswith(b"\x93NUMPY"):
        return "npy"
    raise ValueError(f"not a jpg, png, webp or npy (begins with {head[:8]!r})")


def _size(payload: Payload, kind: str) -> tuple[int, int]:
    """(height, width) from the header alone."""
    if kind == "jpg":
        import simplejpeg

        return simplejpeg.decode_jpeg_header(payload)[:2]
    if kind == "png":
        width, height = struct.unpack(">II", payload[16:24])
        return height, width
    if kind == "npy":
        shape = npy_header(payload)[0]
        if len(shape) != 3 or shape[2] != 3:
            raise ValueError(f"npy of shape {shape}; an image is (H, W, 3)")
        return shape[0], shape[1]
    from PIL import Image

    try:
        with Image.open(io.BytesIO(payload)) as image:  # lazy: reads the header only
            return image.height, image.width
    except (Image.DecompressionBombError, SyntaxError) as error:
        raise ValueError(str(error)) from error


def _check_chunks(payload: Payload) -> None:
    """Every chunk of a PNG ends inside of it: OpenCV takes memory for what a chunk claims to be, up to 4 GB for a damaged byte."""
    position, end = 8, len(payload)
    while position + 12 <= end:
        length, kind = struct.unpack(">I4s", payload[position : position + 8])
        position += 12 + length
        if position > end:
            raise ValueError(f"damaged: chunk {kind!r} of {length} bytes goes past the end of a png of {end}")
        if kind == b"IEND":
            return
    raise ValueError("damaged: png without an end")


def _decode_jpeg(payload: Payload, *, size: tuple[int, int], out: np.ndarray) -> np.ndarray:
    import simplejpeg

    if size == out.shape[:2]:
        simplejpeg.decode_jpeg(payload, colorspace="RGB", buffer=out)
        return out
    # libjpeg can leave out high frequencies: a photo of ten times the resolution is never decoded in full. Twice the
    # wanted side remains, so that the area filter still has pixels to average.
    least = 2 * max(out.shape[:2])
    return simplejpeg.decode_jpeg(payload, colorspace="RGB", min_height=least, min_width=least)


def _decode_opencv(payload: Payload) -> np.ndarray:
    cv2 = _cv2()
    try:
        found = cv2.imdecode(np.frombuffer(payload, np.uint8), cv2.IMREAD_UNCHANGED)
        if found is None:
            raise ValueError("damaged image data")
        if found.dtype == np.uint16:
            found = cv2.convertScaleAbs(found, alpha=1 / 257)  # rounded, without a copy in floats
        if found.dtype != np.uint8:
            raise ValueError(f"pixels of {found.dtype}")
        if found.ndim == 2:
            return cv2.cvtColor(found, cv2.COLOR_GRAY2RGB)
        colour = cv2.cvtColor(found[:, :, :3], cv2.COLOR_BGR2RGB)
    except cv2.error as error:
        raise ValueError(str(error)) from error
    if found.shape[2] == 4 and (alpha := found[:, :, 3:]).min() < 255:
        # Rounded to the nearest: x * a / 255 + white * (1 - a / 255).
        return ((colour.astype(np.uint32) * alpha + BACKGROUND * (255 - alpha.astype(np.uint32)) + 127) // 255).astype(
            np.uint8
        )
    return colour


def _decode_pixels(payload: Payload) -> np.ndarray:
    image = _npy(payload)
    if image.dtype != np.uint8:
        raise ValueError(f"npy of dtype {image.dtype}; an image is uint8")
    return image


def npy_header(payload: Payload) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """(shape, fortran order, dtype, first data byte). ValueError for anything but a plain array."""
    head = bytes(payload[:12])
    first = 10 if head[6:7] == b"\x01" else 12  # version 1 has a length of two bytes, version 2 of four
    size = first + int.from_bytes(head[8:first], "little")
    return _parse_npy_header(bytes(payload[: min(size, 12 + 10_000)]))


@lru_cache(maxsize=1024)
def _parse_npy_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """numpy's parser (a Python literal of at most 10000 characters), once per distinct header: 30 us each."""
    stream = io.BytesIO(header)
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"npy version {version}")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        shape, fortran, dtype = read(stream)
    except (SyntaxError, TokenError, TypeError, EOFError) as error:  # numpy lets a few of its parser's own through
        raise ValueError(f"unreadable npy header ({error})") from error
    if min(shape, default=0) < 0:
        raise ValueError(f"npy of shape {shape}")
    if dtype.hasobject:
        raise ValueError("npy with Python objects is refused: reading it would run a pickle")
    return shape, fortran, dtype, stream.tell()


def _npy(payload: Payload) -> np.ndarray:
    """`np.load(allow_pickle=False)` without its copy (3 us instead of 30 for a latent)."""
    shape, fortran, dtype, start = npy_header(payload)
    expected = math.prod(shape) * dtype.itemsize
    if len(payload) - start != expected:
        raise ValueError(f"npy of shape {shape}, {dtype} needs {expected} data bytes, has {len(payload) - start}")
    return np.frombuffer(payload, dtype, offset=start).reshape(shape, order="F" if fortran else "C")


def _cv2() -> Any:
    import cv2

    if cv2.getNumThreads() > 1:
        cv2.setNumThreads(1)  # the loader's own threads are the parallelism; a pool per call only adds waiting
        cv2.utils.logging.setLogLevel(
            cv2.utils.logging.LOG_LEVEL_SILENT
        )  # a bad sample is told by us, once, with its name
    return cv2

"""Pixels, arrays and captions: exact where a format is exact, refused with the sample's name where it is not sound."""

import io
import json
import resource
import struct

import cv2
import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps

from data_pipeline.decode import decode_array, decode_caption, decode_image, resize_centre
from data_pipeline.errors import BadArray, BadCaption, UndecodableImage, Where
from data_pipeline.prepare import encode_image

WHERE = Where("s.tar", "k", 7)


def picture(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 / width, y * 255 / height, (x + y) * 255 / (height + width)], -1).astype(np.uint8)


def decoded(payload: bytes, resolution: int) -> np.ndarray:
    out = np.empty((resolution, resolution, 3), np.uint8)
    decode_image(payload, out=out, where=WHERE)
    return out


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


@pytest.mark.parametrize("image_format", ["png", "npy", "jpg"])
def test_the_right_size_is_left_alone(image_format: str) -> None:
    image = picture(32, 32)
    error = np.abs(decoded(encode_image(image, image_format=image_format), 32).astype(int) - image)  # type: ignore[arg-type]
    assert error.max() == 0 if image_format != "jpg" else error.mean() < 2


def test_webp_and_png_with_alpha_grey_and_16_bit() -> None:
    image = picture(32, 32)
    lossless = cv2.imencode(".webp", image[:, :, ::-1], [cv2.IMWRITE_WEBP_QUALITY, 101])[1].tobytes()
    assert (decoded(lossless, 32) == image).all()
    grey = cv2.imencode(".png", image[:, :, 0])[1].tobytes()
    assert (decoded(grey, 32) == image[:, :, :1]).all()
    deep = cv2.imencode(".png", image[:, :, ::-1].astype(np.uint16) * 257)[1].tobytes()
    assert np.abs(decoded(deep, 32).astype(int) - image).max() <= 1
    clear = np.concatenate([image[:, :, ::-1], np.full((32, 32, 1), 255, np.uint8)], -1)
    assert (decoded(cv2.imencode(".png", clear)[1].tobytes(), 32) == image).all()


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_pictures_stand_upright_as_pillow_turns_them(orientation: int, form: str) -> None:
    """0 and 9 are no orientations, and change nothing."""
    exif = Image.Exif()
    exif[274] = orientation
    payload = saved(Image.fromarray(picture(32, 48)), form, exif=exif, quality=95)
    with Image.open(io.BytesIO(payload)) as image:
        want = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert np.abs(decoded(payload, 32).astype(int) - resize_centre(want, height=32, width=32)).mean() < 1.5


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_transparent_pixels_lie_over_white(mode: str, form: str) -> None:
    image = Image.fromarray(picture(32, 32)).convert("RGBA")
    image.putalpha(Image.fromarray(np.tile(np.arange(0, 256, 8, dtype=np.uint8), (32, 1))))
    image = image.convert(mode if mode != "PA" else "P").convert("RGBA") if mode == "PA" else image.convert(mode)
    payload = saved(image, form, **({"lossless": True, "exact": True} if form == "WEBP" else {}))
    with Image.open(io.BytesIO(payload)) as read:
        rgba = read.convert("RGBA")
        want = np.asarray(Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB"))
    assert np.abs(decoded(payload, 32).astype(int) - want).max() <= 1
    assert want[:, 0].min() == 255 or mode == "PA"


def test_a_jpeg_of_a_print_shop() -> None:
    image = Image.fromarray(picture(32, 32)).convert("CMYK")
    payload = saved(image, "JPEG", quality=95)
    with Image.open(io.BytesIO(payload)) as read:
        want = np.asarray(read.convert("RGB"))
    assert np.abs(decoded(payload, 32).astype(int) - want).mean() < 2


def test_a_picture_that_is_decoded_in_full_is_bounded_by_what_is_wanted() -> None:
    large = saved(Image.new("1", (4097, 4097)), "PNG")
    assert len(large) < 10_000
    with pytest.raises(UndecodableImage, match="allowed for png: 1 to 16777216"):
        decoded(large, 32)
    assert decoded(large, 257).shape == (257, 257, 3)  # 16 times that side


def test_a_png_whose_chunk_claims_gigabytes_costs_no_memory() -> None:
    payload = bytearray(encode_image(picture(24, 24), image_format="png"))
    at = payload.index(b"IDAT") - 4
    payload[at] = 0xCD
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UndecodableImage, match="goes past the end of a png"):
        decoded(bytes(payload), 24)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kilobytes
    with pytest.raises(UndecodableImage, match="png without an end"):
        decoded(encode_image(picture(24, 24), image_format="png")[:-12], 24)


def test_a_deep_json_is_a_bad_caption() -> None:
    for payload in (b"[" * 100_000, b'{"caption": ' * 100_000, b'{"caption": ["a"]}'):
        with pytest.raises(BadCaption):
            decode_caption(payload, suffix="json", where=WHERE)


@pytest.mark.parametrize("error", [MemoryError(), KeyError("x"), AssertionError("y"), RecursionError()])
def test_whatever_a_library_raises_is_the_samples_fault(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(*_: object) -> None:
        raise error

    monkeypatch.setattr("data_pipeline.decode._decode_opencv", raising)
    with pytest.raises(UndecodableImage, match=r"s.tar, key k"):
        decoded(encode_image(picture(8, 8), image_format="png"), 8)


@pytest.mark.parametrize(("height", "width"), [(64, 32), (32, 64), (50, 200), (20, 31), (33, 32)])
@pytest.mark.parametrize("image_format", ["png", "jpg"])
def test_shorter_side_then_centre(height: int, width: int, image_format: str) -> None:
    got = decoded(encode_image(picture(height, width), image_format=image_format), 32).astype(int)  # type: ignore[arg-type]
    assert got.shape == (32, 32, 3)
    # The centre pixel stays the centre of the gradient, whichever side was cut.
    assert np.abs(got[15:17, 15:17].mean((0, 1)) - 127).max() < 12
    # Along the shorter side the whole gradient is there.
    shorter = got[:, 16, 1] if height <= width else got[16, :, 0]
    assert shorter[0] < 16
    assert shorter[-1] > 236


def test_large_jpeg_is_shrunk_close_to_the_full_decode() -> None:
    image = picture(600, 900)
    payload = simplejpeg.encode_jpeg(image, quality=95)
    full = resize_centre(simplejpeg.decode_jpeg(payload), height=32, width=32)
    assert np.abs(decoded(payload, 32).astype(int) - full).mean() < 1.5


def png_bomb() -> bytes:
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sIIBBBBB", 13, b"IHDR", 60_000, 60_000, 8, 2, 0, 0, 0) + bytes(8)


@pytest.mark.parametrize(
    ("payload", "why"),
    [
        (b"", "not a jpg"),
        (b"GIF89a" + bytes(50), "not a jpg"),
        (b"\xff\xd8\xff" + bytes(50), ""),
        (b"\x89PNG\r\n\x1a\n", ""),
        (png_bomb(), "60000 x 60000"),
        (encode_image(picture(32, 32), image_format="png")[:300], "damaged"),
        (encode_image(picture(64, 64), image_format="jpg")[:700], ""),
        (b"RIFF\x10\0\0\0WEBPVP8 " + bytes(30), ""),
        (npy(np.zeros((32, 32, 3), np.float32)), "uint8"),
        (npy(np.zeros((32, 32), np.uint8)), "(H, W, 3)"),
        (npy(np.zeros((32, 32, 3), np.uint8))[:-1], "needs 3072"),
        (npy(np.zeros((0, 32, 3), np.uint8)), "0 x 32"),
    ],
)
def test_bad_images_are_refused_with_their_place(payload: bytes, why: str) -> None:
    with pytest.raises(UndecodableImage) as caught:
        decoded(payload, 32)
    assert str(caught.value).startswith("shard s.tar, key k, position 7: ")
    assert why in str(caught.value)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_arrays_are_views_of_the_payload(dtype: type) -> None:
    array = np.random.default_rng(0).normal(size=(8, 4, 4)).astype(dtype)
    payload = npy(array)
    got = decode_array(payload, where=WHERE)
    assert got.dtype == dtype
    assert (got == array).all()
    assert (decode_array(memoryview(npy(np.asfortranarray(array))), where=WHERE) == array).all()
    assert not got.flags.owndata


@pytest.mark.parametrize(
    "payload",
    [
        npy(np.array([{"run": "me"}], dtype=object)),
        npy(np.zeros(3, np.float64)),
        npy(np.array([1, np.nan], np.float32)),
        npy(np.array([1, np.inf], np.float16)),
        npy(np.zeros(3, np.float32))[:-2],
        npy(np.zeros(3, np.float32)) + b"x",
        b"\x93NUMPY\x09\x00",
        b"",
        b"\x80\x04K\x01.",
    ],
)
def test_bad_arrays_are_refused(payload: bytes) -> None:
    with pytest.raises(BadArray, match="key k, position 7"):
        decode_array(payload, where=WHERE)


def test_sums_that_overflow_are_no_infinity() -> None:
    big = np.full(100, 60_000, np.float16)
    assert len(decode_array(npy(big), where=WHERE)) == 100


def test_captions() -> None:
    assert decode_caption("  grüne Katze \n".encode(), suffix="txt", where=WHERE) == "grüne Katze"
    payload = json.dumps({"caption": "a cat"}).encode()
    assert decode_caption(memoryview(payload), suffix="meta.json", where=WHERE) == "a cat"


@pytest.mark.parametrize(
    ("payload", "suffix", "why"),
    [
        (b"caf\xe9", "txt", "not UTF-8 .byte 3"),
        (b" \n", "txt", "empty"),
        (b"{", "json", "unreadable json"),
        (b"[1]", "json", "unreadable json"),
        (b'{"text": "x"}', "json", "empty or no text"),
        (b'{"caption": 3}', "json", "json is int instead of text"),
        (b'{"caption": "\xe9"}', "json", "not UTF-8"),
    ],
)
def test_bad_captions(payload: bytes, suffix: str, why: str) -> None:
    with pytest.raises(BadCaption, match=why):
        decode_caption(payload, suffix=suffix, where=WHERE)

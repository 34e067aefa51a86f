"""Random damage gives a typed error or a right answer: never another exception, never an endless loop."""

import io
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest

from data_pipeline.decode import decode_array, decode_image
from data_pipeline.errors import BadArray, CorruptShard, DataError, UndecodableImage, Where
from data_pipeline.index import build_index, scan
from data_pipeline.prepare import encode_image

WHERE = Where("s", "k")


def damaged(payload: bytes, rng: np.random.Generator) -> bytes:
    """Some bytes changed near the front (where structure is), sometimes cut."""
    bad = bytearray(payload)
    for _ in range(int(rng.integers(1, 6))):
        bad[int(len(bad) * rng.random() ** 3)] = int(rng.integers(256))
    return bytes(bad[: int(rng.integers(1, len(bad)))] if rng.random() < 0.3 else bad)


def fixed_checksum(tar: bytes) -> bytes:
    """The first header made valid again, so that damage gets past its checksum."""
    header = bytearray(tar[:512])
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return bytes(header) + tar[512:]


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_damaged_tars(tmp_path: Path, tar_format: int) -> None:
    rng, stream = np.random.default_rng(0), io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tar_format) as tar:
        for name in ("n" * 150 + ".txt" if tar_format != tarfile.USTAR_FORMAT else "n.txt", "b.txt"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    whole = stream.getvalue()[: 512 * 10]
    for _ in range(400):
        bad = damaged(whole, rng)
        for content in (bad, fixed_checksum(bad) if len(bad) > 512 else bad):
            (tmp_path / "a.tar").write_bytes(content)
            try:
                build_index(tmp_path / "a.tar")
            except DataError:
                continue


@pytest.mark.parametrize("size", [b"-0000001000\0", b"zzzzzzzzzzz\0"])
def test_a_size_that_is_no_size(tmp_path: Path, size: bytes) -> None:
    info = tarfile.TarInfo("a.txt")
    header = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    header[124:136] = size
    (tmp_path / "a.tar").write_bytes(fixed_checksum(bytes(header)) + bytes(1024))
    with pytest.raises(CorruptShard, match="byte 0"):
        build_index(tmp_path / "a.tar")


def test_names_that_are_no_text(tmp_path: Path) -> None:
    for name in (b"\xff\xfe.txt", b"a\n.txt\n.npy", b"a.b\x07.txt"):
        header = bytearray(tarfile.TarInfo("a.txt").tobuf(tarfile.USTAR_FORMAT))
        header[:100] = name.ljust(100, b"\0")
        (tmp_path / "a.tar").write_bytes(fixed_checksum(bytes(header)) + bytes(1024))
        assert list(scan(tmp_path / "a.tar").found.left_out) == ["name that is not UTF-8 or holds control characters"]


@pytest.mark.parametrize("image_format", ["jpg", "png", "webp", "npy"])
def test_damaged_images(image_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Sizes that damage makes up just below the true limit are decoded, as they should be, but take their time.
    monkeypatch.setattr("data_pipeline.decode.MAX_PIXELS", 1 << 16)
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (24, 24, 3)).astype(np.uint8)
    if image_format == "webp":
        whole = cv2.imencode(".webp", pixels)[1].tobytes()
    else:
        whole = encode_image(pixels, image_format=image_format)  # type: ignore[arg-type]
    out = np.empty((16, 16, 3), np.uint8)
    for _ in range(300):
        try:
            decode_image(damaged(whole, rng), out=out, where=WHERE)
        except UndecodableImage:
            continue


def test_damaged_arrays() -> None:
    rng, stream = np.random.default_rng(2), io.BytesIO()
    np.save(stream, np.ones((2, 3, 4), np.float32))
    for _ in range(600):
        try:
            assert decode_array(damaged(stream.getvalue(), rng), where=WHERE).dtype in (np.float16, np.float32)
        except BadArray:
            continue

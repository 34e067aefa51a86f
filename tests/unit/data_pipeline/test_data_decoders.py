"""The decoder's slot: DALI and the reference agree on what is good, and deliver the same batches on any threads and ranks."""

from __future__ import annotations

import io
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from data_pipeline.dali import DaliDecoder
from data_pipeline.decoders import ImageDecoder, Picture, PlainDecoder
from data_pipeline.errors import UndecodableImage, Where
from data_pipeline.loader import StreamingLoader
from data_pipeline.manifest import View, open_view
from data_pipeline.prepare import RawMembers, write_shards


def photo(height: int, width: int, *, seed: int = 0) -> np.ndarray:
    """Smooth with some noise, uint8 (height, width, 3)."""
    x, y = np.linspace(0, 1, width)[None, :, None], np.linspace(0, 1, height)[:, None, None]
    noise = np.random.default_rng(seed).normal(0, 4, (height, width, 3))
    return np.clip(127 + 100 * np.sin(6 * x + np.arange(3) + seed) * np.cos(5 * y) + noise, 0, 255).astype(np.uint8)


def jpeg(height: int, width: int, *, seed: int = 0) -> bytes:
    return simplejpeg.encode_jpeg(photo(height, width, seed=seed), quality=90, colorspace="RGB")


def pil(mode: str, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(photo(64, 64)).convert(mode).save(stream, kind, **options)
    return stream.getvalue()


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[274] = orientation
    return pil("RGB", "JPEG", exif=exif, quality=95)


WHOLE = jpeg(64, 64)
FILES = {
    "of its size": WHOLE,
    "grey": pil("L", "JPEG"),
    "cmyk": pil("CMYK", "JPEG"),
    "png": pil("RGB", "PNG"),
    "transparent": pil("RGBA", "PNG"),
    "webp": pil("RGB", "WEBP", lossless=True),
    **{f"turned {n}": turned(n) for n in range(1, 9)},
    "cut": WHOLE[: len(WHOLE) // 2],
    "without an end": WHOLE[:-2],
    "zeroed": WHOLE[: len(WHOLE) // 2] + bytes(len(WHOLE) - len(WHOLE) // 2),
    "garbage": WHOLE[:300] + b"\xa5" * 400,
    "no picture": b"abc" * 50,
    "empty": b"",
}


def decode(decoder: ImageDecoder, files: list[bytes], side: int) -> tuple[np.ndarray, list[UndecodableImage | None]]:
    out = np.zeros((len(files), side, side, 3), np.uint8)
    answers: list[UndecodableImage | None] = []
    for first in range(0, len(files), decoder.at_once):
        part = range(first, min(first + decoder.at_once, len(files)))
        answers += decoder.decode([Picture(files[n], out[n], Where("s.tar", str(n))) for n in part])
    return out, answers


def test_dali_agrees_with_the_reference_on_what_is_good_and_on_every_pixel() -> None:
    want, wanted = decode(PlainDecoder(), list(FILES.values()), 64)
    got, answers = decode(DaliDecoder(at_once=8), list(FILES.values()), 64)
    good = {name: answer is None for name, answer in zip(FILES, answers, strict=True)}
    assert good == {name: answer is None for name, answer in zip(FILES, wanted, strict=True)}
    assert sum(good.values()) == 14
    for n, name in enumerate(FILES):
        if good[name]:
            assert np.array_equal(want[n], got[n]), name


def test_resized_by_dali_is_close_to_the_reference() -> None:
    files = [jpeg(200, 130), jpeg(90, 300), jpeg(40, 40)]
    want, _ = decode(PlainDecoder(), files, 64)
    got, answers = decode(DaliDecoder(), files, 64)
    assert answers == [None] * 3
    assert np.abs(want.astype(int) - got).mean() < 3
    again, _ = decode(DaliDecoder(at_once=1), files[::-1], 64)
    assert np.array_equal(got, again[::-1])  # what else is in a call changes nothing


def test_a_picture_that_ends_dalis_pipeline_costs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.dali.whole_jpeg", lambda payload: (64, 64))  # nothing is kept from it
    decoder = DaliDecoder(at_once=4)
    files = [jpeg(64, 64, seed=n) for n in range(8)]
    files[2] = FILES["cut"]
    got, answers = decode(decoder, files, 64)
    want, _ = decode(PlainDecoder(), files, 64)
    assert decoder.fallbacks == 1
    assert [answer is None for answer in answers] == [n != 2 for n in range(8)]
    good = [n for n in range(8) if n != 2]
    assert np.array_equal(want[good], got[good])


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> View:
    """96 JPEGs, every tenth undecodable."""
    samples = [
        RawMembers(
            key=f"{n:04d}",
            members={"jpg": FILES["cut"] if n % 10 == 3 else jpeg(64, 64, seed=n), "txt": b"a photo"},
        )
        for n in range(96)
    ]
    folder = tmp_path_factory.mktemp("photos")
    write_shards(samples, folder, samples_per_shard=16)
    return open_view(folder)


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_batches_of_dali_are_those_of_the_reference_with_bad_samples(photos: View, threads: int) -> None:
    def batches(decoder: ImageDecoder, *, threads: int, world: int) -> list[tuple[np.ndarray, tuple[str, ...]]]:
        parts = []
        for rank in range(world):
            loader = StreamingLoader(
                photos, global_batch=16, rank=rank, world=world, seed=2, resolution=64, threads=threads,
                on_bad="substitute", max_bad=1, decoder=decoder,
            )  # fmt: skip
            parts.append([next(loader) for _ in range(8)])
            assert loader.stats().bad.get("UndecodableImage", 0) > 0
            loader.close()
        return [
            (np.concatenate([b.images for b in step]), tuple(key for b in step for key in b.keys))
            for step in zip(*parts, strict=True)
        ]

    want = batches(PlainDecoder(), threads=2, world=1)
    for world in (1, 4):
        for (images, keys), (wanted, names) in zip(
            batches(DaliDecoder(at_once=3), threads=threads, world=world), want, strict=True
        ):
            assert keys == names
            assert np.array_equal(images, wanted)


def test_a_bad_sample_ends_a_strict_run_with_its_own_error_whatever_the_decoder(photos: View) -> None:
    messages = []
    for decoder in (PlainDecoder(), DaliDecoder()):
        loader = StreamingLoader(photos, global_batch=16, seed=2, resolution=64, threads=0, decoder=decoder)
        with pytest.raises(UndecodableImage) as caught:
            list(islice(loader, 6))
        messages.append(str(caught.value))
        loader.close()
    assert messages[0] == messages[1]


def test_without_dali_the_slot_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from data_pipeline.errors import DataError

    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(DataError, match=r"pip install 'ecdit\[dali\]'"):
        DaliDecoder()


def test_a_folder_that_is_used_by_both(photos: View, tmp_path: Path) -> None:
    """A resume may change the decoder: the place does not name it."""
    loader = StreamingLoader(photos, global_batch=16, seed=2, resolution=64, on_bad="substitute", max_bad=1)
    first = [next(loader) for _ in range(3)]
    state = loader.state_dict()
    want = next(loader)
    other = StreamingLoader(
        photos, global_batch=16, seed=2, resolution=64, on_bad="substitute", max_bad=1, decoder=DaliDecoder()
    )
    other.load_state_dict(state)
    got = next(other)
    assert got.keys == want.keys
    assert np.array_equal(got.images, want.images)
    assert len(first) == 3
    loader.close()
    other.close()


def test_what_dali_lets_through_is_what_its_module_says() -> None:
    """Damaged compressed data that end well: the reference calls them bad, and so does the checksum of an index."""
    rng = np.random.default_rng(0)
    only_reference = 0
    for _ in range(30):
        file = bytearray(jpeg(64, 64, seed=1))
        place = int(rng.integers(700, len(file) - 20))
        file[place : place + 16] = rng.bytes(16).replace(b"\xff", b"\x00")
        (want,), (got,) = (decode(decoder, [bytes(file)], 64)[1] for decoder in (PlainDecoder(), DaliDecoder()))
        assert got is None or want is not None, "what DALI refuses the reference refuses"
        only_reference += want is not None and got is None
    assert only_reference > 0

"""Pictures are shared out among sizes by the shape that their own headers say, and each sample is in one list at most."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from preparing_forms import picture

from data_pipeline import views
from data_pipeline.buckets import Bucket, Buckets
from data_pipeline.errors import BadSplit
from data_pipeline.manifest import View, open_view
from data_pipeline.prepare import RawMembers, encode_image, write_shards
from data_pipeline.preparing.select import make_facts
from data_pipeline.preparing.sizes import Size, nearest, read_size, sort_by_size

SQUARE, WIDE, HIGH = (Size(height=h, width=w) for h, w in ((256, 256), (192, 320), (320, 192)))


@pytest.mark.parametrize(("height", "width", "expected"), [
    (100, 100, SQUARE), (300, 500, WIDE), (500, 300, HIGH), (100, 900, WIDE), (100, 128, SQUARE), (100, 130, WIDE),
])  # fmt: skip
def test_the_nearest_aspect_ratio_counts(height, width, expected):
    """Between 1 and 5/3 the middle of the logarithms is 1.291."""
    sizes = [SQUARE, WIDE, HIGH]
    assert sizes[nearest(sizes, height=height, width=width)] == expected


def test_of_one_shape_the_largest_that_needs_no_enlarging():
    sizes = [Size(height=n, width=n) for n in (256, 1024, 512)]
    assert [sizes[nearest(sizes, height=n, width=n + 1)].height for n in (100, 256, 511, 512, 1023, 1024, 9999)] == [
        256, 256, 256, 512, 512, 1024, 1024,
    ]  # fmt: skip
    assert sizes[nearest(sizes, height=700, width=511)].height == 256


def test_equally_near_takes_the_first():
    assert nearest([WIDE, HIGH], height=64, width=64) == 0
    assert nearest([HIGH, WIDE], height=64, width=64) == 0


@pytest.mark.parametrize("text", ["256", "0x256", "256 x 256", "x", "256x-1", "2e2x3"])
def test_what_is_no_size(text):
    with pytest.raises(BadSplit, match="HEIGHTxWIDTH"):
        read_size(text)


def turned(payload: bytes) -> bytes:
    """The camera was held sideways."""
    from PIL import Image

    image, stream = Image.open(io.BytesIO(payload)), io.BytesIO()
    exif = image.getexif()
    exif[274] = 6
    image.save(stream, "JPEG", exif=exif)
    return stream.getvalue()


SHAPES = [(64, 64)] * 5 + [(40, 66)] * 4 + [(66, 40)] * 3
"""5 square, 4 wide, 3 high; of the wide ones one is turned upright and high."""


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> View:
    samples = []
    for number, (height, width) in enumerate(SHAPES):
        payload = encode_image(picture(number, height=height, width=width), image_format="jpg")
        payload = turned(payload) if number == 8 else payload
        samples.append(RawMembers(key=f"{number:02d}", members={"jpg": payload, "txt": b"x"}))
    samples.insert(6, RawMembers(key="no-picture", members={"txt": b"x"}))
    samples.insert(9, RawMembers(key="torn", members={"jpg": b"\xff\xd8\xff", "txt": b"x"}))
    folder = tmp_path_factory.mktemp("mixed")
    write_shards(samples, folder, samples_per_shard=4)
    return open_view(folder)


EXPECTED = {SQUARE: [0, 1, 2, 3, 4], WIDE: [5, 7, 8], HIGH: [10, 11, 12, 13]}


def test_every_sample_is_in_one_list(mixed, tmp_path):
    work, _ = make_facts(mixed.folder)
    found = sort_by_size(work, sizes=[SQUARE, WIDE, HIGH])
    assert found.counts == {SQUARE: 5, WIDE: 3, HIGH: 4}
    assert (found.without, found.left_out) == (2, {})
    written = found.write(tmp_path / "sizes")
    masks = {size: views.kept(mixed, [path]).mask() for size, path in written.items()}
    assert {size: np.flatnonzero(mask).tolist() for size, mask in masks.items()} == EXPECTED
    stream = Buckets(
        mixed, [
            Bucket(name=size.name, height=size.height, width=size.width, samples=views.open_keep(path, view=mixed))
            for size, path in written.items()
        ], seed=0, global_batch=3,
    )  # fmt: skip
    first = np.cumsum([0, *mixed.shard_sizes])
    for step in range(20):
        at = stream.locate(np.arange(3) + 3 * step)
        bucket = stream.of(step)
        mine = EXPECTED[Size(height=bucket.height, width=bucket.width)]
        assert set((first[at.shard] + at.sample).tolist()) <= set(mine)


def test_sizes_of_few_samples_give_theirs_away(mixed):
    work, _ = make_facts(mixed.folder)
    found = sort_by_size(work, sizes=[SQUARE, WIDE, HIGH], least=5)
    assert found.counts == {SQUARE: 12}
    assert found.left_out == {WIDE.name: 3, HIGH.name: 4}
    assert sort_by_size(work, sizes=[SQUARE, WIDE, HIGH], least=4).counts == {SQUARE: 8, HIGH: 4}
    assert sort_by_size(work, sizes=[SQUARE, Size(height=8, width=512)]).counts == {SQUARE: 12}
    with pytest.raises(BadSplit, match="nearest: 12"):
        sort_by_size(work, sizes=[SQUARE], least=13)
    with pytest.raises(BadSplit, match="each once"):
        sort_by_size(work, sizes=[SQUARE, SQUARE])


def test_nothing_to_sort(tmp_path: Path):
    write_shards([RawMembers(key="a", members={"txt": b"x"})], tmp_path, samples_per_shard=4)
    work, _ = make_facts(tmp_path)
    with pytest.raises(BadSplit, match="no sample has a picture"):
        sort_by_size(work, sizes=[SQUARE])

"""Captions and pictures as foreign sets have them: several suffixes, several texts, some samples without."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest

from data_pipeline.assemble import default_fields
from data_pipeline.captions import CaptionRule, NoCaptionError
from data_pipeline.contract import Batch
from data_pipeline.errors import BadCaption, BadSplit, TooManyBad, Where
from data_pipeline.indexing import index_folder
from data_pipeline.loader import StreamingLoader
from data_pipeline.manifest import View
from data_pipeline.prepare import RawMembers, write_shards
from data_pipeline.reader import Value

N = 120


def raw(**members: str | bytes) -> dict[str, Value]:
    fields = {
        name.replace("_", "."): memoryview(v.encode() if isinstance(v, str) else v) for name, v in members.items()
    }
    return fields


def at(position: int) -> Where:
    return Where("s.tar", "k", position)


ABOUT = json.dumps({"caption": "short", "long": "a long one", "none": None, "blank": " "})


@pytest.mark.parametrize(
    ("sources", "want"),
    [
        (("txt", "json"), "a text"),
        (("json", "txt"), "short"),
        (("json:long",), "a long one"),
        (("json:none", "json:blank", "json:absent", "txt"), "a text"),
    ],
)
def test_the_first_that_is_there(sources: tuple[str, ...], want: str) -> None:
    assert CaptionRule(sources=sources).choose(raw(txt="a text", json=ABOUT), where=at(3)) == want


def test_one_is_drawn_by_weight_and_position() -> None:
    rule = CaptionRule(sources=("txt", "json", "json:long", "json:none"), weights=(1, 2, 1, 5), seed=7)
    sample = raw(txt="a text", json=ABOUT)
    drawn = [rule.choose(sample, where=at(position)) for position in range(4000)]
    assert drawn == [rule.choose(sample, where=at(position)) for position in range(4000)]
    counts = Counter(drawn)
    assert set(counts) == {"a text", "short", "a long one"}  # what a sample has not is not drawn
    assert all(abs(counts[text] / 4000 - share) < 0.04 for text, share in (("a text", 0.25), ("short", 0.5)))
    other = CaptionRule(sources=rule.sources, weights=rule.weights, seed=8)
    assert drawn != [other.choose(sample, where=at(position)) for position in range(4000)]


def test_a_sample_without() -> None:
    empty = raw(txt=" ", json="{}")
    rule = {"sources": ("txt", "json")}
    with pytest.raises(BadCaption, match=r"data\.no_caption"):
        CaptionRule(**rule).choose(empty, where=at(0))
    with pytest.raises(NoCaptionError):
        CaptionRule(**rule, missing="skip").choose(empty, where=at(0))
    assert CaptionRule(**rule, missing="unconditional").choose(empty, where=at(0)) is None
    for missing in ("skip", "unconditional"):  # one that cannot be read is bad whatever is asked
        with pytest.raises(BadCaption, match="not UTF-8"):
            CaptionRule(**rule, missing=missing).choose(raw(txt=b"caf\xe9"), where=at(0))


@pytest.mark.parametrize("weights", [(1.0,), (0.0, 0.0), (-1.0, 2.0)])
def test_weights_that_are_none(weights: tuple[float, ...]) -> None:
    with pytest.raises(BadSplit, match="caption weights"):
        CaptionRule(sources=("txt", "json"), weights=weights)


def picture(number: int) -> np.ndarray:
    return np.full((16, 16, 3), number, np.uint8)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> View:
    """jpg, png and webp by turns; every tenth sample without a caption, the others as txt or json."""
    folder = tmp_path_factory.mktemp("foreign")
    suffixes = ("jpg", "png", "webp")
    samples = []
    for number in range(N):
        suffix = suffixes[number % 3]
        members = {suffix: cv2.imencode(f".{suffix}", picture(number))[1].tobytes()}
        if number % 10 != 4:
            about = {"txt": f"text {number}".encode(), "json": json.dumps({"caption": f"json {number}"}).encode()}
            members |= {name: about[name] for name in (("txt", "json", "txt")[number % 3],)}
        samples.append(RawMembers(key=f"{number:04d}", members=members))
    write_shards(samples, folder, samples_per_shard=30)
    (folder / "manifest.json").unlink()
    for idx in folder.glob("*.idx"):
        idx.unlink()
    return index_folder(folder)


def batches(view: View, steps: int, **options: object) -> tuple[list[Batch], StreamingLoader]:
    stream = StreamingLoader(view, global_batch=24, seed=3, resolution=16, **options)  # type: ignore[arg-type]
    got = [next(stream) for _ in range(steps)]
    stream.close()
    return got, stream


@pytest.mark.parametrize("threads", [0, 3])
def test_mixed_suffixes_and_missing_captions_are_trained_on(foreign: View, threads: int) -> None:
    assert default_fields(foreign).images == ("jpg", "png", "webp")
    got, stream = batches(foreign, 5, captions=CaptionRule(missing="unconditional"), threads=threads)
    seen = {}
    for batch in got:
        assert batch.images is not None
        assert batch.captions is not None
        assert batch.captioned is not None
        for key, image, caption, captioned in zip(
            batch.keys, batch.images, batch.captions, batch.captioned, strict=True
        ):
            number = int(key)
            assert abs(int(image.mean()) - number) <= 3
            assert captioned == (number % 10 != 4)
            assert caption == ("" if not captioned else f"{('text', 'json', 'text')[number % 3]} {number}")
            seen[number] = caption
    assert len(seen) == N
    assert (stream.stats().uncaptioned, stream.stats().skipped, stream.stats().bad) == (N // 10, 0, {})


@pytest.mark.parametrize("on_bad", ["fail", "substitute"])
def test_skipped_samples_are_replaced_and_counted_apart(foreign: View, on_bad: str) -> None:
    """The same on any number of threads and ranks, and no reason to stop."""
    rule = CaptionRule(missing="skip")
    got, stream = batches(foreign, 5, captions=rule, on_bad=on_bad, max_bad=0.0)
    keys = [key for batch in got for key in batch.keys]
    assert not [key for key in keys if int(key) % 10 == 4]
    assert (stream.stats().skipped >= N // 10, stream.stats().bad) == (True, {})
    ranks = [batches(foreign, 5, captions=rule, on_bad=on_bad, rank=rank, world=2, threads=0)[0] for rank in range(2)]
    assert keys == [key for one, two in zip(*ranks, strict=True) for key in (*one.keys, *two.keys)]


def test_by_default_they_are_bad(foreign: View) -> None:
    with pytest.raises(BadCaption):
        batches(foreign, 5)
    _, stream = batches(foreign, 5, on_bad="substitute", max_bad=0.5)
    assert set(stream.stats().bad) == {"BadCaption"}
    with pytest.raises(TooManyBad):
        batches(foreign, 5, on_bad="substitute", max_bad=0.01)


def test_a_set_without_any_caption_ends_the_search(tmp_path: Path) -> None:
    png = cv2.imencode(".png", picture(1))[1].tobytes()
    samples = [RawMembers(key=f"{n:03d}", members={"png": png, "txt": b" "}) for n in range(48)]
    with pytest.raises(TooManyBad, match="bad or left out"):
        batches(write_shards(samples, tmp_path), 1, captions=CaptionRule(missing="skip"))

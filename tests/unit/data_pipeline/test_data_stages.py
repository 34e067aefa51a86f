"""A user's webdataset stages behind our order: batches that are the same on any ranks and threads, with every loss counted."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import pytest
import webdataset as wds

from data_pipeline.contract import Batch
from data_pipeline.errors import BadStage, TooManyBad
from data_pipeline.loader import StreamingLoader
from data_pipeline.manifest import View
from data_pipeline.stages import Stages


def flip(sample: dict[str, Any]) -> dict[str, Any]:
    """A draw that is keyed by the position, so it is the same everywhere."""
    rng = np.random.default_rng(sample["__position__"])
    pixels = np.asarray(sample["png"])
    return sample | {"png": pixels[:, ::-1] if rng.random() < 0.5 else pixels, "txt": sample["txt"].upper()}


def loader(view: View, stages: list[Any], **options: Any) -> StreamingLoader:
    settings = {"global_batch": 16, "seed": 3, "resolution": 16, "threads": 2} | options
    return StreamingLoader(view, stages=Stages(stages), **settings)


def deliver(view: View, stages: list[Any], *, steps: int, world: int = 1, **options: Any) -> list[list[Batch]]:
    parts = []
    for rank in range(world):
        one = loader(view, stages, rank=rank, world=world, **options)
        parts.append([next(one) for _ in range(steps)])
        one.close()
    return [list(step) for step in zip(*parts, strict=True)]


def test_pixels_and_captions_are_those_that_the_stages_made(shapes_view: View) -> None:
    plain = StreamingLoader(shapes_view, global_batch=16, seed=3, resolution=16)
    want, got = next(plain), deliver(shapes_view, [wds.decode("rgb8"), wds.map(flip)], steps=1)[0][0]
    plain.close()
    assert got.keys == want.keys
    assert got.captions == tuple(text.upper() for text in want.captions)
    flipped = [
        np.array_equal(g, w[:, ::-1]) and not np.array_equal(g, w) for g, w in zip(got.images, want.images, strict=True)
    ]
    kept = [np.array_equal(g, w) for g, w in zip(got.images, want.images, strict=True)]
    assert all(f or k for f, k in zip(flipped, kept, strict=True))
    assert 0 < sum(flipped) < 16


@pytest.mark.parametrize("decode", [wds.decode("rgb8"), wds.decode("pil"), lambda stream: stream])
def test_any_form_of_a_picture_is_taken(shapes_view: View, decode: Any) -> None:
    want = deliver(shapes_view, [], steps=2)
    got = deliver(shapes_view, [decode], steps=2)
    for (a,), (b,) in zip(got, want, strict=True):
        assert np.array_equal(a.images, b.images)
        assert a.captions == b.captions


def test_the_same_on_any_ranks_and_threads_and_across_a_resume(shapes_view: View) -> None:
    stages = [wds.decode("rgb8"), wds.map(flip), wds.select(lambda s: "RED" not in s["txt"])]
    want = deliver(shapes_view, stages, steps=8, threads=0)
    assert all("RED" not in text for (batch,) in want for text in batch.captions)
    for world, threads in ((2, 1), (4, 3), (8, 0)):
        for parts, (whole,) in zip(
            deliver(shapes_view, stages, steps=8, world=world, threads=threads), want, strict=True
        ):
            assert tuple(key for part in parts for key in part.keys) == whole.keys
            assert np.array_equal(np.concatenate([part.images for part in parts]), whole.images)
    one = loader(shapes_view, stages)
    for _ in range(5):
        next(one)
    other = loader(shapes_view, stages, threads=0)
    other.load_state_dict(one.state_dict())
    assert np.array_equal(next(other).images, want[5][0].images)
    assert one.stats().skipped > 0
    assert one.stats().bad == {}
    one.close()
    other.close()


def fail_on(word: str) -> Any:
    def check(sample: dict[str, Any]) -> dict[str, Any]:
        if word in sample["txt"].decode():
            raise ZeroDivisionError("my own mistake")
        return sample

    return wds.map(check)


def test_a_stage_that_raises_makes_a_bad_sample_that_is_counted(shapes_view: View) -> None:
    one = loader(shapes_view, [fail_on("red")], on_bad="substitute", max_bad=1)
    batches = [next(one) for _ in range(20)]
    assert all("red" not in text for batch in batches for text in batch.captions)
    assert one.stats().bad.keys() == {"BadStage"}
    one.close()
    strict = loader(shapes_view, [fail_on("red")])
    with pytest.raises(BadStage, match="a stage raised ZeroDivisionError: my own mistake"):
        list(islice(strict, 20))
    strict.close()
    never = loader(shapes_view, [fail_on("")], on_bad="substitute", max_bad=1)
    with pytest.raises(TooManyBad, match="my own mistake"):
        next(never)
    never.close()


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ([wds.batched(4)], "several samples of one|gave a|must be bytes"),
        ([lambda stream: (s for sample in stream for s in (sample, sample))], "several samples of one"),
        ([wds.to_tuple("png", "txt")], "gave a tuple"),
        ([wds.map(lambda s: s | {"png": 7})], "png as int"),
        ([wds.map(lambda s: s | {"png": np.zeros((4, 4), np.float32)})], r"pixels of \(4, 4\) float32"),
    ],
)
def test_what_is_no_sample_is_said_to_be_none(shapes_view: View, stages: list[Any], words: str) -> None:
    one = loader(shapes_view, stages)
    with pytest.raises(Exception, match=words):
        next(one)
    one.close()

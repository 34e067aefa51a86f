"""Truth passes, shuffled captions stay at chance, noise fails; the figures of ShapeEval hold at every canvas."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.shapes.draw import BACKGROUND, GAP, MARGIN, ShapesSpec, coverage, shape_sample
from data_pipeline.shapes.grader import detect, grade, single_object
from data_pipeline.shapes.make import make_shapes
from data_pipeline.shapes.prompts import COLORS, SHAPES, TASKS, all_prompts, held_out

CANVASES = [(16, (0.2, 0.35)), (16, (0.5, 0.9)), (32, (0.2, 0.35)), (32, (0.15, 0.8))]
CANVASES += [(64, (0.1, 0.5)), (23, (0.2, 0.5))]


def samples(num: int, spec: ShapesSpec, seed: int = 0) -> list:
    return [shape_sample(index, spec=spec, seed=seed) for index in range(num)]


@pytest.mark.parametrize(("resolution", "scale"), CANVASES)
def test_truth_is_always_right(resolution: int, scale: tuple[float, float]) -> None:
    drawn = samples(300, ShapesSpec(resolution=resolution, scale=scale))
    wrong = [(s.caption, g.reason) for s in drawn if not (g := grade(s.image, s.metadata, strict=True)).correct]
    assert wrong == []
    assert {s.metadata["tag"] for s in drawn} == set(TASKS)


@pytest.mark.parametrize("resolution", [32, 64])
def test_shuffled_captions_score_about_a_tenth(resolution: int) -> None:
    drawn = samples(600, ShapesSpec(resolution=resolution), seed=1)
    other = np.random.default_rng(0).permutation(len(drawn))
    rate = np.mean([grade(s.image, drawn[i].metadata).correct for s, i in zip(drawn, other, strict=True)])
    assert 0.06 < rate < 0.14


@pytest.mark.parametrize("resolution", [16, 32, 64])
def test_noise_and_nothing_score_zero(resolution: int) -> None:
    rng = np.random.default_rng(0)
    wanted = [s.metadata for s in samples(100, ShapesSpec(resolution=resolution))]
    flat = np.full((resolution, resolution, 3), BACKGROUND, np.uint8)
    for metadata in wanted:
        noise = rng.integers(0, 256, (resolution, resolution, 3)).astype(np.uint8)
        assert not grade(noise, metadata).correct
        assert not grade(flat, metadata).correct


def test_a_little_noise_is_forgiven() -> None:
    rng = np.random.default_rng(0)
    drawn = samples(200, ShapesSpec())
    noisy = [np.clip(s.image + rng.normal(0, 8, s.image.shape), 0, 255).astype(np.uint8) for s in drawn]
    assert np.mean([grade(i, s.metadata).correct for i, s in zip(noisy, drawn, strict=True)]) >= 0.99


def test_single_objects_are_named_at_every_size() -> None:
    for resolution in (16, 32, 64):
        spec = ShapesSpec(resolution=resolution, mix={"colors": 1.0}, scale=(0.1, 1.0))
        for s in samples(200, spec):
            wanted = s.metadata["include"][0]
            assert single_object(s.image) == (wanted["class"], wanted["color"])
            assert detect(s.image)[0].box == s.boxes[0]
    two = shape_sample(0, spec=ShapesSpec(mix={"two_object": 1.0}), seed=0)
    assert single_object(two.image) is None


def test_samples_are_a_function_of_seed_and_index() -> None:
    spec = ShapesSpec()
    one = samples(40, spec)
    with ThreadPoolExecutor(4) as pool:
        backwards = list(pool.map(lambda i: shape_sample(i, spec=spec, seed=0), range(39, -1, -1)))[::-1]
    assert all((a.image == b.image).all() and a.metadata == b.metadata for a, b in zip(one, backwards, strict=True))
    assert sum((a.image == b.image).all() for a, b in zip(one, samples(40, spec, seed=1), strict=True)) == 0


def test_a_set_written_today_is_the_one_written_before(tmp_path: Path) -> None:
    """A run that is resumed after its shards were lost and made again trains on the same bytes."""
    mix = {"single_object": 1.0, "colors": 4.0, "position": 2.0}
    made = make_shapes(tmp_path, count=60, resolution=24, seed=7, samples_per_shard=25, image_format="npy", mix=mix)
    assert made.sha256 == "1d02746abe6c788eac5763bd9cb2b4a7fe1284493cb43efab928dcc1fd664c03"


def test_mix_is_followed() -> None:
    drawn = samples(400, ShapesSpec(mix={"colors": 3.0, "single_object": 1.0, "counting": 0.0}))
    count = Counter(s.metadata["tag"] for s in drawn)
    assert set(count) == {"colors", "single_object"}
    assert 0.65 < count["colors"] / 400 < 0.85


def test_objects_keep_their_distance() -> None:
    for s in samples(200, ShapesSpec(resolution=24, scale=(0.2, 0.6))):
        for i, a in enumerate(s.boxes):
            assert min(a.x0, a.y0) >= MARGIN
            assert max(a.x1, a.y1) <= 24 - MARGIN
            for b in s.boxes[:i]:
                assert max(a.x0 - b.x1, b.x0 - a.x1, a.y0 - b.y1, b.y0 - a.y1) >= GAP


def test_metadata_follows_genevals_schema() -> None:
    for s in samples(300, ShapesSpec()):
        m = s.metadata
        assert set(m) <= {"tag", "include", "exclude", "prompt"}
        assert ("exclude" in m) == (m["tag"] == "counting")
        assert m["prompt"].startswith("a photo of ")
        assert all(x["class"] in SHAPES and x.get("color", "red") in COLORS for x in m["include"])
        if m["tag"] == "position":
            assert m["include"][1]["position"][1] == 0
            assert m["prompt"].count(m["include"][1]["position"][0]) == 1


def test_prompts_are_780_and_an_eighth_of_color_attr_is_withheld() -> None:
    every = [m["prompt"] for m in all_prompts()]
    assert len(set(every)) == len(every) == 780
    withheld = {m["prompt"] for m in all_prompts(split="heldout")}
    assert withheld == {m["prompt"] for m in all_prompts(tasks=["color_attr"]) if held_out(m["prompt"])}
    assert 60 < len(withheld) < 110
    assert {m["prompt"] for m in all_prompts(split="train")} == set(every) - withheld
    trained = {s.caption for s in samples(3000, ShapesSpec(resolution=16, mix={"color_attr": 1.0}))}
    assert not trained & withheld
    tested = {s.caption for s in samples(500, ShapesSpec(resolution=16, mix={"color_attr": 1.0}, split="heldout"))}
    assert tested <= withheld


def test_captions_are_english() -> None:
    captions = {s.caption for s in samples(2000, ShapesSpec(resolution=16))}
    assert "a photo of three crosses" in captions or "a photo of two crosses" in captions
    assert any(" blue squares" in caption for caption in captions)
    assert any("left of a green" in caption for caption in captions)


@pytest.mark.parametrize("shape", SHAPES)
def test_templates_have_the_area_of_their_shape(shape: str) -> None:
    area = {"square": 1.0, "circle": np.pi / 4, "triangle": 0.5, "cross": 5 / 9}[shape]
    assert abs(coverage(shape, height=24, width=24).mean() - area) < 0.02


@pytest.mark.parametrize(
    "wrong",
    [{"resolution": 8}, {"scale": (0.5, 0.2)}, {"mix": {"colours": 1.0}}, {"mix": {}}, {"mix": {"colors": -1.0}}],
)
def test_bad_specs_are_refused(wrong: dict) -> None:
    with pytest.raises(DataError, match=r"must be|weights of"):
        ShapesSpec(**wrong)

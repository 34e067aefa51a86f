"""Allocation by counting; what the command says follows from the numbers, whichever way they point."""

from __future__ import annotations

import json
from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import configure, live

from data_pipeline.shapes.draw import BACKGROUND
from data_pipeline.shapes.grader import foreground
from ecdit_train import build
from ecdit_train.allocation_verb import allocation
from ecdit_train.errors import ConfigError
from ecdit_train.evaluate.allocation import Allocation, auc, document, on_drawn_pictures, on_true_pictures
from ecdit_train.evaluate.masked import masked_pictures
from ecdit_train.evaluate.routing_probe import probe
from ecdit_train.evaluate.suites import shapes_for, shapes_seen
from ecdit_train.parallel.runtime import start
from ecdit_train.run_folder import allocation_path


@pytest.fixture(scope="module")
def config(tiny_shards, tmp_path_factory):
    config = configure(tmp_path_factory.mktemp("run") / "run", tiny_shards, "moe=expert_choice", "train.steps=4")
    live(config)
    return config


@pytest.fixture
def pipeline(config):
    runtime = start("cpu")
    yield build.build_pipeline(config, runtime, kind="raw", step=None)[0]
    runtime.shutdown()


def made(on: list[float], off: list[float]) -> Allocation:
    """One timestep, one layer, a seed for each value."""
    on_R, off_R = (np.array(x)[:, None, None] for x in (on, off))
    nothing = np.zeros_like(on_R)
    rest = {"unselected_object": nothing, "unselected_background": nothing, "auc": nothing}
    return Allocation(pictures=1, left_out=0, timesteps=(0.5,), on_object=on_R, on_background=off_R, **rest)


def test_auc_is_what_pairs_say() -> None:
    rng = np.random.default_rng(0)
    on, off = rng.integers(0, 5, 40), rng.integers(0, 7, 30)
    pairs = [(a > b) + (a == b) / 2 for a in on for b in off]
    assert auc(on, off) == pytest.approx(np.mean(pairs))
    assert auc(np.array([3, 4]), np.array([0, 1])) == 1.0
    assert auc(np.array([0]), np.array([1])) == 0.0


@pytest.mark.parametrize(
    ("on", "off", "words"),
    [
        ([3.0, 3.1, 2.9], [1.0, 1.0, 1.0], "get more: 3.00"),
        ([1.0, 1.1, 0.9], [2.0, 2.0, 2.0], "get less: 0.50"),
        ([2.0, 2.2, 1.8], [2.0, 2.0, 2.0], "get alike"),
        ([3.0], [1.0], "one seed"),
        ([float("nan")], [float("nan")], "no picture shows an object"),
    ],
)
def test_what_is_said_follows_from_the_numbers(on, off, words) -> None:
    assert words in made(on, off).says()
    json.dumps(document({"true": made(on, off)}, step=1), allow_nan=False)


def test_true_pictures_count_as_the_probe_does(pipeline) -> None:
    """The probe has the same noise seed for all; its pictures all show an object beside a background."""
    known = shapes_for(pipeline, seed=9)
    usable = known.on_object.any(1) & ~known.on_object.all(1)
    found = on_true_pictures(pipeline, lambda seed: known, seeds=[20_000])
    assert found.left_out == int((~usable).sum())
    if not found.left_out:
        wanted = probe(pipeline, known)
        np.testing.assert_allclose(found.on_object[0], wanted.on_object, rtol=1e-6)
        np.testing.assert_allclose(found.on_background[0], wanted.on_background, rtol=1e-6)


def test_pictures_without_an_object_are_left_out_and_counted(pipeline) -> None:
    known = shapes_for(pipeline, seed=9)
    known.on_object[0], known.on_object[1] = False, True
    usable = known.on_object.any(1) & ~known.on_object.all(1)
    found = on_true_pictures(pipeline, lambda seed: known, seeds=[1, 2])
    assert found.left_out == 2 * int((~usable).sum()) >= 4
    assert found.pictures == 2 * len(usable)


def test_experts_that_love_objects_are_seen_to(pipeline) -> None:
    """Patches of a drawn picture are told to be objects exactly where it got the most: then objects get more, and AUC is 1."""
    side = pipeline.config.latent_side // pipeline.config.model.patch
    seen = {}

    def busiest(images: np.ndarray) -> np.ndarray:
        drawn = pipeline.draw(["a photo of a red circle"] * len(images), how=pipeline.config.sample, step=4)
        total = drawn.maps.counts.sum((0, 1))
        busy = total > np.median(total, axis=(1, 2), keepdims=True)
        seen["busy"] = busy
        return busy.repeat(images.shape[1] // side, 1).repeat(images.shape[1] // side, 2)

    prompts = ["a photo of a red circle"] * 4
    found = on_drawn_pictures(pipeline, prompts, seeds=[pipeline.config.sample.seed], step=4, objects=busiest)
    assert 0 < seen["busy"].mean() < 1
    assert found.on_object.mean() > found.on_background.mean()


def test_foreground_is_what_is_far_from_the_background() -> None:
    image = np.full((4, 4, 3), BACKGROUND, np.uint8)
    image[1, 2] = (255, 0, 0)
    assert np.argwhere(foreground(image)).tolist() == [[1, 2]]
    assert np.argwhere(foreground(np.stack([image, image])))[:, 0].tolist() == [0, 1]


def test_the_command_writes_what_it_prints(config, tiny_shards, capsys) -> None:
    code = allocation(Namespace(words=[f"run={config.run}", "seeds=2", "images=8"], config_dir=None))
    out = capsys.readouterr().out
    path = allocation_path(build.Path(config.run), step=4)
    told = json.loads(path.read_text())
    assert code == 0
    assert set(told["kinds"]) == {"true", "drawn"}
    for kind in told["kinds"].values():
        assert kind["says"] in out
        assert np.shape(kind["on_object"]["seeds"]) == (2, len(kind["timesteps"]), len(told["layers"]))
    seen = shapes_seen(config)
    assert seen.trained == ("as in its training set" in out)
    assert Image.open(path.with_suffix(".png")).size[0] > 200


def test_pictures_of_ones_own(config, tmp_path, capsys) -> None:
    for n in range(3):
        mask = np.zeros((20, 30), np.uint8)
        mask[:, 5 + 5 * n : 15] = 255
        Image.fromarray(np.full((20, 30, 3), 40 * n, np.uint8)).save(tmp_path / f"p{n}.png")
        Image.fromarray(mask).save(tmp_path / f"p{n}.mask.png")
    (tmp_path / "p0.txt").write_text("a wall\n")
    own = masked_pictures(tmp_path, resolution=16, side=4, multiple=2)
    assert own.images.shape == (2, 16, 16, 3)
    assert own.captions == ("a wall", "")
    # The middle 20 x 20: columns 5 to 25, of which 5 to 15 are object: the left half.
    assert own.on_object[0].reshape(4, 4).tolist() == [[True, True, False, False]] * 4
    code = allocation(
        Namespace(words=[f"run={config.run}", f"pictures={tmp_path}", f"out={tmp_path / 'o.json'}"], config_dir=None)
    )
    assert code == 0
    assert set(json.loads((tmp_path / "o.json").read_text())["kinds"]) == {"true"}
    assert "3 of" not in capsys.readouterr().err


@pytest.mark.parametrize("what", ["none", "no mask", "sizes", "no picture"])
def test_pictures_that_cannot_be_looked_at(tmp_path, what) -> None:
    if what != "none":
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    if what == "sizes":
        Image.fromarray(np.zeros((8, 9), np.uint8)).save(tmp_path / "a.mask.png")
    if what == "no picture":
        (tmp_path / "a.mask.png").write_bytes(b"GIF89a")
    with pytest.raises(ConfigError, match="pictures"):
        masked_pictures(tmp_path, resolution=16, side=4, multiple=1)


def test_a_dense_run_is_refused(tiny_shards, tmp_path) -> None:
    live(configure(tmp_path / "dense", tiny_shards, "moe=dense", "train.steps=4"))
    with pytest.raises(ConfigError, match="every patch gets the same"):
        allocation(Namespace(words=[f"run={tmp_path / 'dense'}"], config_dir=None))


def test_weights_are_not_trained_by_looking(pipeline) -> None:
    before = {name: p.clone() for name, p in pipeline.parallel.model.named_parameters()}
    on_true_pictures(pipeline, lambda seed: shapes_for(pipeline, seed=seed), seeds=[1])
    assert all(torch.equal(p, before[name]) for name, p in pipeline.parallel.model.named_parameters())
    assert pipeline.parallel.model.training

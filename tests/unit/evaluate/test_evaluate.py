"""Drawing and scoring."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_runs import ROUTERS, configure, live

from ecdit_train import build
from ecdit_train.diffusion.samplers.heun import Heun
from ecdit_train.errors import CheckpointError, ConfigError
from ecdit_train.evaluate import shapes
from ecdit_train.evaluate.pictures import WATCHED_TIMESTEPS, _watched
from ecdit_train.evaluate.suites import shapes_suite
from ecdit_train.observe.routing import count_maps
from ecdit_train.parallel.runtime import start

PROMPTS = ["a red circle", "a blue square", "a green triangle"]


@pytest.fixture(scope="module")
def trained(tiny_shards, tmp_path_factory):
    config = configure(tmp_path_factory.mktemp("trained"), tiny_shards, "train.steps=8", "optim.ema_decay=0.5")
    live(config)
    return config


@pytest.fixture(scope="module")
def pipeline(trained):
    return build.build_pipeline(trained, start("cpu"), kind="ema", step=None)[0]


def test_a_picture_does_not_depend_on_its_neighbours(pipeline, trained):
    """With scope image, whatever else is drawn and however it is cut into batches."""
    how = replace(trained.sample, scope="image", steps=3)
    together = pipeline.draw(PROMPTS, how=how, step=8)
    for i, prompt in enumerate(PROMPTS):
        assert np.array_equal(pipeline.draw([prompt], how=how, step=8).images[0], together.images[i])
    assert np.array_equal(pipeline.draw(PROMPTS, how=how, step=8, batch=2).images, together.images)


def test_the_same_words_and_seed_draw_the_same_picture(pipeline, trained):
    a = pipeline.draw(["a red circle"] * 2, how=trained.sample, step=8).images
    b = pipeline.draw(["a red circle"], how=replace(trained.sample, seed=1), step=8).images
    assert not np.array_equal(a[0], b[0])


@pytest.mark.parametrize("scope", ["image", "group", "batch"])
def test_shapes_and_maps(pipeline, trained, scope):
    how = replace(trained.sample, scope=scope, group_size=32, steps=7)  # a group is two images; three prompts
    pictures = pipeline.draw(PROMPTS, how=how, step=8)
    assert pictures.images.shape == (3, 16, 16, 3)
    assert pictures.images.dtype == np.uint8
    maps = pictures.maps
    assert maps.counts.shape == (WATCHED_TIMESTEPS, 1, 3, 4, 4)
    if scope == "image":  # every image gets E * C = patches * f_c experts in all
        assert (maps.counts.sum(axis=(-1, -2)) == 16 * trained.moe.router.capacity_factor).all()


@pytest.mark.parametrize(("images", "batch"), [(2, 3), (3, 64), (3, 2), (5, 4)])
def test_a_batch_is_rounded_to_whole_pools(pipeline, trained, images, batch):
    """Down, but to one pool at least: 3 pictures in flight are one pool of 2, then the rest."""
    how = replace(trained.sample, scope="group", group_size=16 * images)
    rows: list[int] = []
    seen = lambda *a: rows.append(a[2].patches_BKP.shape[0] // 2)  # noqa: E731
    hook = pipeline.parallel.model.register_forward_hook(seen)
    try:
        pictures = pipeline.draw([*PROMPTS, *PROMPTS], how=replace(how, guidance=2.0), step=8, batch=batch)
    finally:
        hook.remove()
    assert set(map(bool, rows)) == {True}
    assert max(rows) <= max(images, batch)
    assert all(n % images == 0 for n in rows)
    whole = pipeline.draw([*PROMPTS, *PROMPTS], how=replace(how, guidance=2.0), step=8, batch=60)
    assert np.array_equal(pictures.images, whole.images)


def test_heuns_maps_are_of_the_states_not_of_the_guesses(pipeline, trained):
    """Evaluations with 4 steps: t0, guess of t1, t1, guess of t2, t2, guess of t3, t3."""
    how = replace(trained.sample, sampler=Heun(), steps=4, scope="image")
    said = []
    hook = pipeline.parallel.model.register_forward_hook(
        lambda _model, _args, out: said.append(
            count_maps(out.assignments, batch=out.patches_BKP.shape[0], side=4)[:, : len(PROMPTS)].numpy()
        )
    )
    try:
        maps = pipeline.draw(PROMPTS, how=how, step=8).maps
    finally:
        hook.remove()
    assert len(said) == 7
    assert np.array_equal(maps.counts, np.stack([said[i] for i in (0, 2, 4, 6)]))
    assert not np.array_equal(maps.counts, np.stack([said[i] for i in (0, 1, 3, 5)]))  # or nothing was shown


def test_a_dense_model_has_no_maps(tiny_shards, tmp_path):
    config = configure(tmp_path, tiny_shards, *ROUTERS["dense"], "train.steps=4")
    live(config)
    pipeline, step = build.build_pipeline(config, start("cpu"), kind="ema", step=None)
    assert step == 4
    assert pipeline.draw(PROMPTS, how=config.sample, step=step).maps is None
    wide = replace(config.sample, scope="group", group_size=16 * 7)  # nothing is routed, so nothing is filled up
    assert pipeline.draw(PROMPTS, how=wide, step=step, batch=2).images.shape[0] == 3


@pytest.mark.parametrize("steps", [1, 2, 5, 7, 20, 50])
def test_watched_timesteps_are_the_samplers_own(steps):
    watched = _watched(replace(configure("r", "s").sample, steps=steps), WATCHED_TIMESTEPS)
    assert len(watched) == min(steps, WATCHED_TIMESTEPS)
    assert watched[0] == 0.0
    assert watched[-1] == (steps - 1) / steps
    assert set(watched) <= {n / steps for n in range(steps)}


def test_raw_and_averaged_weights(trained):
    weights = {}
    for kind in ("ema", "raw"):
        pipeline, step = build.build_pipeline(trained, start("cpu"), kind=kind, step=None)
        weights[kind] = pipeline.parallel.model.final.weight.detach().clone()
        assert step == 8
    assert not torch.equal(weights["ema"], weights["raw"])
    assert build.build_pipeline(trained, start("cpu"), kind="ema", step=4)[1] == 4
    with pytest.raises(CheckpointError, match=r"no committed checkpoint of step 5; it has \[4, 8\]"):
        build.build_pipeline(trained, start("cpu"), kind="ema", step=5)


def test_a_perfect_painter_scores_one_and_a_blind_one_by_chance():
    suite = shapes_suite(resolution=32, tasks=["colors"], repeat=1, split="all")
    from data_pipeline.shapes.draw import ShapesSpec, shape_sample

    spec, true = ShapesSpec(resolution=32, mix={"colors": 1.0}, split="all"), {}
    for i in range(3000):
        sample = shape_sample(i, spec=spec, seed=9)
        true.setdefault(sample.metadata["prompt"], sample.image)
        if len(true) == len(suite.metadata):
            break
    images = np.stack([true[m["prompt"]] for m in suite.metadata])
    perfect = shapes.score(images, suite.metadata, grade=suite.grade, others=suite.others)
    assert perfect.overall == 1.0
    assert perfect.num_images == len(images)
    assert 0.0 <= perfect.chance < 0.3
    blank = shapes.score(np.full_like(images, 128), suite.metadata, grade=suite.grade, others=suite.others)
    assert blank.overall == 0.0


def test_overall_is_the_mean_over_tasks_not_over_pictures():
    metadata = [{"tag": "colors"}] * 3 + [{"tag": "counting"}]
    images = np.array([1, 1, 1, 0])
    score = shapes.score(images, metadata, grade=lambda image, _: bool(image), others=np.zeros(4))
    assert score.by_task == {"colors": 1.0, "counting": 0.0}
    assert score.overall == 0.5
    assert score.chance == 0.0


def test_a_result_is_written_as_json(tmp_path):
    score = shapes.score(np.ones(1), [{"tag": "colors"}], grade=lambda *_: True, others=np.zeros(1))
    shapes.write(score, tmp_path / "evaluation" / "shapes.json", step=7)
    read = json.loads((tmp_path / "evaluation" / "shapes.json").read_text())
    assert read["step"] == 7
    assert read["by_task"] == {"colors": 1.0}


def test_no_prompt_left_is_refused():
    with pytest.raises(ConfigError, match="only color_attr is held out"):
        shapes_suite(resolution=16, tasks=["colors"], repeat=1, split="heldout")

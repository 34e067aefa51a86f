"""The probe on a real tiny run: what it says is what counting says, and its ends are right."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_runs import configure, live

from data_pipeline.shapes.draw import BACKGROUND, ShapesSpec
from ecdit_train import build
from ecdit_train.evaluate.routing_probe import TIMESTEPS, probe
from ecdit_train.evaluate.suites import known_shapes
from ecdit_train.parallel.runtime import start

SPEC = ShapesSpec(resolution=16, scale=(0.4, 0.7))


@pytest.fixture(scope="module")
def known():
    return known_shapes(SPEC, count=6, patch_pixels=4, seed=9)


@pytest.fixture
def pipeline(tiny_shards, tmp_path):
    config = configure(tmp_path / "run", tiny_shards, "moe=expert_choice", "train.steps=4", "sample.scope=image")
    live(config)
    runtime = start("cpu")
    yield build.build_pipeline(config, runtime, kind="raw", step=None)[0]
    runtime.shutdown()


def test_patches_with_objects_are_those_that_are_painted(known) -> None:
    assert known.on_object.shape == (6, 16)
    assert known.on_object.any(1).all()
    assert not known.on_object.all(1).any()
    for image, on in zip(known.images, known.on_object, strict=True):
        for place, painted in enumerate(on):
            y, x = divmod(place, 4)
            pixels = image[4 * y : 4 * y + 4, 4 * x : 4 * x + 4].reshape(-1, 3)
            assert painted == (sum(tuple(p) != BACKGROUND for p in pixels) >= 8)


def test_what_it_counts(pipeline, known) -> None:
    found = probe(pipeline, known)
    layers = len(pipeline.config.sparse_layers)
    assert np.shape(found.on_object) == np.shape(found.on_background) == (len(TIMESTEPS), layers)
    # Expert choice spends f_c per patch on average, whoever gets it.
    share = known.on_object.mean()
    whole = share * np.array(found.on_object) + (1 - share) * np.array(found.on_background)
    assert whole == pytest.approx(2.0, abs=1e-5)
    assert found.max_violation == pytest.approx(
        (0.0,) * layers, abs=1e-6
    )  # and every expert the same number of patches
    assert all(0 < s < 1 for s in found.timestep_sensitivity)
    assert all(0 < u <= 1 for u in found.combination_usage)
    assert probe(pipeline, known) == found  # nothing is drawn anew


def test_a_router_that_does_not_see_the_time_has_no_sensitivity(pipeline, known) -> None:
    with torch.no_grad():
        for router in pipeline.parallel.model.routers:
            router.weight.zero_()
    assert probe(pipeline, known).timestep_sensitivity == pytest.approx((0.0,), abs=1e-12)


def test_what_follows_the_tokens_alone_is_not_told_to_be_the_time(pipeline, known) -> None:
    """With modulations and the timestep's embedding silenced, nothing but the tokens decides; they vary, and
    the time does nothing."""
    with torch.no_grad():
        model = pipeline.parallel.model
        for name, p in model.named_parameters():
            if "modulation" in name:
                p.zero_()
        for router in model.routers:
            router.weight.normal_(generator=torch.Generator().manual_seed(0))
    found = probe(pipeline, known)
    assert found.timestep_sensitivity == pytest.approx((0.0,), abs=1e-12)
    assert np.std(found.on_object) > 0


def test_a_worse_network_has_a_larger_loss(pipeline, known) -> None:
    before = probe(pipeline, known).loss
    with torch.no_grad():
        pipeline.parallel.model.final.weight.add_(1.0)
    after = probe(pipeline, known).loss
    assert all(b > a for a, b in zip(before, after, strict=True))

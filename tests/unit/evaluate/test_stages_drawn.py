"""Pictures are drawn with the routers' stage of the checkpoint that they come from, in and after training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_runs import configure, live

from ecdit_train import build
from ecdit_train.observe.routing import RoutingMaps
from ecdit_train.parallel.runtime import start
from ecdit_train.run_folder import routing_path

FACTORS = {2: 2.0, 4: 4.0, 6: 4.0, 8: 1.0}
"""By the step of the checkpoint: edges at 4 and 8, where the next update would use the new factor."""


@pytest.fixture(scope="module")
def run(tiny_shards, tmp_path_factory):
    config = configure(
        tmp_path_factory.mktemp("stages"),
        tiny_shards,
        *("moe=nucleus", "moe.num_experts=4", "moe.router.schedule=[[4,4.0],[8,1.0]]"),
        *("train.steps=9", "checkpoint.every_steps=2", "checkpoint.keep=9", "observe.sample_every=2"),
    )
    assert live(config).finished
    return config


@pytest.mark.parametrize("step", FACTORS)
def test_while_training(run, step):
    maps = RoutingMaps.load(routing_path(Path(run.run), step=step))
    assert maps.counts.mean() == maps.capacity_factor == FACTORS[step]


def test_after_training(run):
    """Each pipeline is new; the counts themselves say how many experts worked on a patch."""
    runtime = start("cpu")
    seen = {}
    for step in FACTORS:
        pipeline, loaded = build.build_pipeline(run, runtime, kind="raw", step=step)
        assert loaded == step
        assert {router.stage.capacity_factor for router in pipeline.parallel.model.routers} == {FACTORS[step]}
        seen[step] = pipeline.draw(["a red circle"], how=run.sample, step=step)
    runtime.shutdown()
    for step, pictures in seen.items():
        assert pictures.maps.counts.mean() == pictures.maps.capacity_factor == FACTORS[step]
    assert not np.array_equal(seen[4].images, seen[8].images)

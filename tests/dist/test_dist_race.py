"""Whole runs of Expert Race by the real composition root: the same curve on every layout, everything saved on one and loaded on
another, bit for bit, its buffers among it."""

from __future__ import annotations

import pytest
from dist_harness import run_distributed
from dist_runs import Layout
from dist_training import curves, interrupted, resumed_elsewhere
from tiny_runs import records

STEPS = 8
RUN = ("moe=expert_race", "moe.num_experts=4", "moe.router.capacity_factor=1.0", "moe.router.pool_images=8",
       f"train.steps={STEPS}", "train.global_batch=8", "optim.warmup_steps=4", "checkpoint.every_steps=4",
       "observe.log_every=4")  # fmt: skip
ONE = {"one": Layout(world=1, words=("train.microbatch=8",))}
FOUR = {
    "dp4": Layout(world=4, words=("train.microbatch=2",)),
    "tp2_ep4": Layout(world=4, words=("train.microbatch=4", "parallel.tp=2", "parallel.ep=4")),
}
BUFFERS = [f"buffer/blocks.{n}.feed_forward.router.threshold" for n in (0, 1)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_shards):
    folder = tmp_path_factory.mktemp("race-runs")
    lives = run_distributed(1, curves, folder, tiny_shards, ONE, RUN, timeout=200)[0]
    return folder, lives | run_distributed(4, curves, folder, tiny_shards, FOUR, RUN, timeout=300)[0]


def test_equal_on_every_layout(runs):
    folder, lives = runs
    one = lives["one"]
    for name, life in lives.items():
        assert life.finished
        assert life.losses == pytest.approx(one.losses, rel=2e-5), name
        assert life.norms == pytest.approx(one.norms, rel=2e-4), name
    logged = {name: records(folder / name)[-1] for name in lives}
    for key in ("moe/L1/threshold", "moe/budget_used", "train/similarity_loss", "train/layer_target_loss"):
        assert logged["one"][key] > 0
        for name in lives:
            assert logged[name][key] == pytest.approx(logged["one"][key], rel=1e-4), (name, key)
    assert logged["one"]["moe/experts_per_token"] == 1.0
    assert logged["one"]["moe/L1/threshold"] != 1.0, "it has moved from its first value"


def test_everything_survives_another_layout(runs, tiny_shards):
    folder, lives = runs
    saved = lives["tp2_ep4"].tensors
    assert saved.keys() >= {*BUFFERS}
    loaded = run_distributed(4, resumed_elsewhere, folder / "tp2_ep4", tiny_shards, FOUR, RUN, timeout=200)[0]
    loaded |= run_distributed(1, resumed_elsewhere, folder / "tp2_ep4", tiny_shards, ONE, RUN, timeout=200)[0]
    assert len(loaded) == 3
    for name, digests in loaded.items():
        assert digests == saved, name


def test_interrupted_is_bitwise_the_whole(tiny_shards, tmp_path):
    extra = (*RUN, "train.steps=12", "train.microbatch=4", "parallel.ep=2")
    whole, *parts = run_distributed(2, interrupted, tmp_path, tiny_shards, {"ep2": extra}, timeout=240)[0]["ep2"]
    assert [life.step for life in parts] == [1, 5, 12]
    assert tuple(loss for life in parts for loss in life.losses) == whole.losses
    assert parts[1].loaded == parts[0].tensors
    assert parts[2].tensors == whole.tensors

"""Decisions about a run that goes wrong are the same on all ranks, copies are compared, and held-out losses belong to no layout."""

from __future__ import annotations

import pytest
from dist_harness import run_distributed
from dist_health import flipped, one_rank_sees_nan, validated
from dist_runs import Layout

RUN = ("train.steps=8", "train.global_batch=8", "train.microbatch=2", "checkpoint.every_steps=2", "checkpoint.keep=9")
LAYOUTS = {
    "dp2": Layout(world=2),
    "tp2": Layout(world=2, words=("parallel.tp=2",)),
    "dp2_ep2": Layout(world=2, words=("parallel.ep=2",)),
    "replicas2": Layout(world=2, words=("parallel.dp_replicate=2",)),
    "tp2_ep4": Layout(world=4, words=("parallel.tp=2", "parallel.ep=4")),
    "replicas4": Layout(world=4, words=("parallel.dp_replicate=4",)),
}


@pytest.mark.parametrize(("policy", "words"), [("skip", ()), ("skip", ("parallel.tp=2",)), ("roll_back", ("parallel.ep=2",))],
                         ids=["skip", "skip-tp2", "roll_back-ep2"])  # fmt: skip
def test_what_one_rank_sees_all_ranks_do(policy, words, tiny_shards, tmp_path):
    words = (*RUN, f"health.non_finite={policy}", *words)
    bad, good = (
        run_distributed(2, one_rank_sees_nan, tmp_path / name, tiny_shards, words, 1, gone, timeout=120)[0]
        for name, gone in (("bad", False), ("good", True))
    )
    assert bad["acts"][0] == bad["acts"][1]
    assert bad["acts"].count([]) == 0
    assert bad["acts"][0].count(policy) == 1
    assert set(good["acts"][0]) == {"update"}
    assert bad["finished"]
    if policy == "skip":
        assert bad["tensors"] == good["tensors"], "bit for bit the run without that batch"


def layouts_of(world):
    return {name: layout for name, layout in LAYOUTS.items() if layout.world == world}


def test_the_held_out_loss_belongs_to_no_layout(tiny_shards, tmp_path):
    words = (*RUN, "validation.images=16")
    one = run_distributed(1, validated, tmp_path, tiny_shards, {"one": Layout(world=1)}, words, timeout=120)[0]["one"]
    for world in (2, 4):
        some = layouts_of(world)
        for name, measured in run_distributed(world, validated, tmp_path, tiny_shards, some, words, timeout=180)[
            0
        ].items():
            assert measured == pytest.approx(one, rel=2e-6, abs=1e-9), name
            drift = {key: value for key, value in measured.items() if "drift" in key}
            assert drift == {key: one[key] for key in drift}, (name, "shares of counts are equal")
    assert len([key for key in one if key.startswith("loss_t")]) > 3
    assert one["L2/selection_drift"] > 0.1
    assert one["selection_drift"] == sum(v for k, v in one.items() if k.startswith("L")) / len(
        [k for k in one if k.startswith("L")]
    )


@pytest.mark.parametrize("world", [2, 4])
def test_one_flipped_bit_in_a_copy_is_found_and_its_rank_named(world, tiny_shards, tmp_path):
    for name, found in run_distributed(world, flipped, tmp_path, tiny_shards, layouts_of(world), RUN, timeout=180)[
        0
    ].items():
        first, *flips, last = found
        assert first == last
        copies = name.startswith("replicas") or "tp" in name
        assert (first > 0) == copies, name
        for culprit, said in flips:
            assert bool(said) == copies, (name, culprit)
            if not copies:
                continue
            assert said.startswith("step 9: copies of a parameter differ between ranks: "), said
            if name == "replicas4":
                assert f" on rank {culprit}." in said or f"on rank {culprit};" in said, (name, culprit, said)
            else:
                assert str(culprit) in said.partition("Suspects")[2], (name, culprit, said)

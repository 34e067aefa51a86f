"""Shared experts, SwiGLU experts, Nucleus's and DiffMoE's routers are the same on every layout; a run whose capacity factor changes
resumes in the right stage by its step alone, bitwise, also elsewhere; DiffMoE draws the same pictures on any number of ranks."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
from dist_cases import IMAGES, KEPT, case
from dist_cases_nucleus import (
    DIFFMOE,
    NUCLEUS,
    NUCLEUS_SIGMOID,
    PER_IMAGE,
    SHARED,
    SHARED_SWIGLU,
    check_cases,
    gone_on,
    stopped,
)
from dist_harness import run_distributed
from dist_runs import Layout
from dist_sampling import draw
from dist_training import curves, interrupted
from test_dist_grid import BOUND_FP64
from test_dist_grid import assert_equal as assert_equal_by
from tiny_runs import records, steady

assert_equal = functools.partial(assert_equal_by, check=check_cases)


def nucleus(moe=NUCLEUS, **layout):
    return case(moe=moe, group_tokens=PER_IMAGE, steps=2, **layout)


def diffmoe(world: int, *, tp: int = 1, microbatches: int = 1, **layout):
    """A group is a microbatch of a data-parallel rank, so the reference's groups are as large."""
    tokens = IMAGES * KEPT * tp // world // microbatches
    return case(moe=DIFFMOE, group_tokens=tokens, tp=tp, microbatches=microbatches, steps=2, **layout)


def test_two_ranks() -> None:
    assert_equal(2, [
        *(case(moe=SHARED_SWIGLU, steps=2, **layout) for layout in ({"tp": 2}, {"ep": 2, "chunks": 2}, {"tp": 2, "ep": 2})),
        case(moe=SHARED, steps=2, tp=2, ep=2),
        nucleus(), nucleus(tp=2, ac="selective"), nucleus(ep=2, microbatches=2, chunks=2), nucleus(tp=2, ep=2),
        nucleus(tp=2, ep=2, dtype="float32"), nucleus(NUCLEUS_SIGMOID, tp=2, ep=2),
        diffmoe(2), diffmoe(2, tp=2), diffmoe(2, ep=2, microbatches=2, ac="selective"), diffmoe(2, tp=2, ep=2),
        diffmoe(2, ep=2, dtype="float32"),
    ])  # fmt: skip


@pytest.mark.slow
def test_two_ranks_in_other_ways() -> None:
    assert_equal(2, [
        *(case(moe=SHARED, steps=2, **layout) for layout in ({}, {"tp": 2}, {"ep": 2})),
        case(moe=SHARED_SWIGLU, steps=2), case(moe=SHARED_SWIGLU, steps=2, ep=2),
        case(moe=SHARED_SWIGLU, steps=2, tp=2, ep=2, dtype="float32"),
        nucleus(tp=2), nucleus(ep=2), nucleus(rep=2, ac="full"), nucleus(dtype="float32"),
        diffmoe(2, ep=2), diffmoe(2, tp=2, ep=2, dtype="float32"),
    ])  # fmt: skip


def test_four_ranks() -> None:
    assert_equal(4, [
        case(moe=SHARED_SWIGLU, steps=2, tp=2, ep=4), nucleus(tp=2, ep=4), nucleus(rep=2, tp=2, ep=2),
        diffmoe(4, tp=2, ep=4), diffmoe(4, rep=2, ep=2), nucleus(tp=2, ep=2, dtype="float32"), diffmoe(4, ep=4, dtype="float32"),
    ])  # fmt: skip


@pytest.mark.slow
def test_eight_ranks() -> None:
    assert_equal(8, [nucleus(rep=2, tp=2, ep=4), diffmoe(8, tp=2, ep=4), case(moe=SHARED, steps=2, tp=2, ep=8)])


def test_poisons_are_found() -> None:
    cases = [case(moe=SHARED_SWIGLU, tp=2, steps=1, poison="shared_region"), nucleus(ep=2, poison="timesteps")]
    region, timesteps = (errors for _, errors in run_distributed(2, check_cases, cases)[0])
    assert region.loss < BOUND_FP64, "only gradients tell"
    assert region.grad > 1e4 * BOUND_FP64
    assert timesteps.loss > 1e4 * BOUND_FP64


# --- whole runs --------------------------------------------------------------------------------------------------------

EDGES = "moe.router.schedule=[[3,4.0],[8,1.0]]"
STAGED = ("moe=nucleus", "moe.num_experts=4", "moe.router.capacity_factor=2.0", "train.microbatch=2")
PREDICTED = ("moe=diffmoe", "moe.num_experts=4", "train.microbatch=2", "optim.lr=1e-3", "moe.router.momentum=0.5")
"""Thresholds arrive within twelve steps; at the usual momentum nearly all experts would still be asked for."""
TWO_RANKS = {
    "staged_dp2_ep2": (*STAGED, EDGES, "parallel.ep=2"),
    "staged_tp2": (*STAGED, EDGES, "parallel.tp=2"),
    "predicted_dp2_ep2": (*PREDICTED, "parallel.ep=2"),
}
ONE = {"one": Layout(world=1)}
FOUR = {"dp2_tp2_ep4": Layout(world=4, words=("parallel.tp=2", "parallel.ep=4"))}
MORE = FOUR | {"dp4": Layout(world=4)}
LAYOUTS = pytest.mark.parametrize("layouts", [FOUR, pytest.param(MORE, marks=pytest.mark.slow)], ids=["one", "every"])
"""Of four ranks."""


@pytest.fixture(scope="module")
def lives(tiny_shards, tmp_path_factory):
    """Each run in one life of 12 steps, and in three that stop after 1, 5 and 12."""
    folder = tmp_path_factory.mktemp("nucleus-runs")
    return folder, run_distributed(2, interrupted, folder, tiny_shards, TWO_RANKS, timeout=240)[0]


@pytest.mark.parametrize("name", TWO_RANKS)
def test_interrupted_and_resumed_bitwise(lives, name):
    """Lives end within a stage and begin in the one that their step says: edges lie at 3 and 8."""
    folder, found = lives
    whole, *parts = found[name]
    assert [life.step for life in parts] == [1, 5, 12]
    assert tuple(loss for life in parts for loss in life.losses) == whole.losses
    assert all(after.loaded == before.tensors for before, after in itertools.pairwise(parts))
    assert parts[-1].tensors == whole.tensors
    a, b = (steady(records(folder / name / run)) for run in ("whole", "parts"))
    assert a == b


def test_stages_change_what_is_computed(lives, tiny_shards, tmp_path):
    """From the first edge on, and not before it: losses without a schedule part ways there."""
    constant = {"constant": Layout(world=2, words=(*STAGED, "parallel.ep=2"))}
    plain = run_distributed(2, curves, tmp_path, tiny_shards, constant, (), timeout=120)[0]["constant"].losses
    staged = lives[1]["staged_dp2_ep2"][0].losses
    assert staged[:3] == plain[:3]
    assert all(a != b for a, b in zip(staged[3:], plain[3:], strict=True))


@LAYOUTS
def test_resumed_on_another_layout(layouts, lives, tiny_shards, tmp_path):
    """Saved on two ranks after step 4, within the second stage; loaded to the same bits, buffers too, on one and on four."""
    _, found = lives
    runs = {"staged": (*STAGED, EDGES), "predicted": PREDICTED}
    saved = run_distributed(2, stopped, tmp_path, tiny_shards, {n: (*w, "parallel.ep=2") for n, w in runs.items()})[0]
    for name, life in saved.items():
        assert life.losses == found[f"{name}_dp2_ep2"][0].losses[:4]
    assert any(n.endswith("router.threshold") for n in saved["predicted"].tensors)
    elsewhere = run_distributed(1, gone_on, tmp_path, tiny_shards, runs, ONE, timeout=120)[0]
    elsewhere |= run_distributed(4, gone_on, tmp_path, tiny_shards, runs, layouts, timeout=200)[0]
    for (name, layout), life in elsewhere.items():
        assert life.loaded == saved[name].tensors, (name, layout)
        assert life.losses == pytest.approx(found[f"{name}_dp2_ep2"][0].losses[4:], rel=1e-4), (name, layout)


# --- pictures ----------------------------------------------------------------------------------------------------------

PROMPTS = ["a red circle", "a blue square", "a green triangle"]
ASKED = [("image", PROMPTS[:1]), ("image", PROMPTS), ("group", PROMPTS)]


@LAYOUTS
def test_diffmoe_draws_the_same_on_one_and_on_four_ranks(layouts, lives, tiny_shards):
    folder, _ = lives
    run = folder / "predicted_dp2_ep2" / "whole"
    drawn = run_distributed(1, draw, run, tiny_shards, {"one": Layout(world=1, words=PREDICTED)}, ASKED, timeout=120)[0]
    four = {name: Layout(world=4, words=(*PREDICTED, *layout.words)) for name, layout in layouts.items()}
    answers = run_distributed(4, draw, run, tiny_shards, four, ASKED, timeout=240)
    for answer in answers:
        for name, pictures in answer.items():
            for (scope, prompts), (images, counts), (true, true_counts) in zip(
                ASKED, pictures, drawn["one"], strict=True
            ):
                error = int(np.abs(images.astype(int) - true.astype(int)).max())
                assert error <= 1, (name, scope, len(prompts), error)
                assert np.array_equal(counts, true_counts), (name, scope)
    counts = drawn["one"][1][1]
    assert len({int(c.sum()) for c in counts.reshape(-1, *counts.shape[-2:])}) > 1, "every picture got the same compute"
    assert 0.2 < counts.mean() < 3.0, "thresholds decide nothing: f_c is 1 of 4 experts"

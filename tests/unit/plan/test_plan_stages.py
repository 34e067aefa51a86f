"""A run whose capacity factor changes: every stage is priced, the largest memory must fit. And what SwiGLU and shared experts cost,
down to Nucleus-Image's published sizes."""

from __future__ import annotations

import pytest

from ecdit_train import plan
from ecdit_train.plan import flops, parameters

STAGED = "moe.router.schedule=[[100000,4.0],[500000,1.0]]"


@pytest.fixture(scope="module")
def plans(cfg_of):
    constant = {f: plan.estimate(cfg_of("ec_dit_xl_8e", f"moe.router.capacity_factor={f}")) for f in (2.0, 4.0, 1.0)}
    return plan.estimate(cfg_of("ec_dit_xl_8e", STAGED)), constant


def test_every_stage_costs_what_a_constant_run_of_its_factor_costs(plans):
    staged, constant = plans
    assert [(at.first, at.last, at.experts_per_token) for at in staged.stages] == [
        (0, 100_000, 2.0),
        (100_000, 500_000, 4.0),
        (500_000, 800_000, 1.0),
    ]
    for at in staged.stages:
        assert at.cost == constant[at.experts_per_token].cost
    expected = sum((at.last - at.first) * constant[at.experts_per_token].cost.step_time.seconds for at in staged.stages)
    assert staged.seconds == pytest.approx(expected)
    assert len({at.cost.flops.model for at in staged.stages}) == 3


def test_memory_is_the_largest_stages_and_activation_the_last_ones(plans):
    staged, constant = plans
    assert staged.cost == constant[4.0].cost
    assert staged.min_nodes == constant[4.0].min_nodes
    assert staged.parameters.activated == constant[1.0].parameters.activated
    assert staged.parameters.total == constant[1.0].parameters.total
    assert staged.cfg.moe.router.experts_per_token() == 4.0


def test_what_does_not_fit_in_one_stage_does_not_fit(cfg_of, plans):
    constant = plans[1]
    memory = f"cluster.gpu_memory={(constant[1.0].cost.memory.total + constant[4.0].cost.memory.total) / 2}"
    small, large = (
        plan.estimate(cfg_of("ec_dit_xl_8e", memory, f"moe.router.capacity_factor={f}")) for f in (1.0, 4.0)
    )
    rising = ("moe.router.capacity_factor=1.0", "moe.router.schedule=[[9,4.0]]")
    staged = plan.estimate(cfg_of("ec_dit_xl_8e", memory, *rising))
    assert (small.fits, large.fits, staged.fits) == (True, False, False)
    assert staged.suggested == large.suggested
    assert staged.suggested is not None


def test_document(plans):
    staged, constant = plans
    tree, text = plan.to_json(staged), plan.render(staged)
    assert [at["first"] for at in tree["stages"]] == [0, 100_000, 500_000]
    assert [at["memory_total"] for at in tree["stages"]] == [constant[f].cost.memory.total for f in (2.0, 4.0, 1.0)]
    assert max(at["memory_total"] for at in tree["stages"]) == tree["memory_per_rank"]["total"]
    assert "100,000 to 500,000" in text
    single = plan.to_json(constant[2.0])["stages"]
    assert single[0] == {
        "first": 0,
        "last": 800_000,
        "experts_per_token": 2.0,
        "flops_per_step": constant[2.0].cost.flops.model,
        "seconds": constant[2.0].cost.step_time.seconds,
        "memory_total": constant[2.0].cost.memory.total,
    }
    assert "stages" not in plan.render(constant[2.0])


def test_swiglu_and_shared_experts(cfg_of):
    """Three matrices an expert; a shared one is passed by every token."""
    cfg = cfg_of("ec_dit_xl_8e", "moe/experts=swiglu", "moe.expert_ratio=2.0", "moe.shared_experts=2")
    D, H, E, sparse = 1152, 2304, 8, 14
    counted = parameters.count(cfg)
    assert counted.by_part["experts"] == sparse * E * 3 * D * H
    assert counted.by_part["shared_experts"] == sparse * 3 * D * 2 * H
    gelu = parameters.count(cfg_of("ec_dit_xl_8e", "moe.expert_ratio=3.0", "moe.shared_experts=2"))
    assert counted.by_part["experts"] == gelu.by_part["experts"]
    assert counted.by_part["shared_experts"] == gelu.by_part["shared_experts"]
    tokens = cfg.train.global_batch * cfg.tokens_per_image
    found = flops.per_step(cfg, checkpointing="none").by_part
    assert found["experts"] == 3 * sparse * tokens * 2.0 * 6 * D * H
    assert found["shared_experts"] == 3 * sparse * tokens * 6 * D * 2 * H


def test_nucleus_has_its_published_sizes(cfg_of):
    """17B in all and about 2B active: the public configuration's layers, without a router's or a text encoder's share."""
    counted = parameters.count(cfg_of("nucleus_17b"))
    assert counted.by_part["experts"] == 29 * 64 * 3 * 2048 * 1344
    assert counted.by_part["shared_experts"] == 29 * 3 * 2048 * 1344
    assert counted.by_part["router"] == 29 * 2 * 2048 * 64
    assert counted.total == pytest.approx(17e9, rel=0.01)
    assert counted.activated == pytest.approx(2.15e9, rel=0.01)

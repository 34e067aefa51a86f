"""What routers send when they select over all ranks: planned, bounded, and held against the dry run."""

from __future__ import annotations

import pytest
from test_plan_dry_run import by_name, dry_run

from ecdit_train.plan import layout, parameters, traffic


def selection_flows(cfg, world):
    flows = traffic.per_step(cfg, parameters.count(cfg), layout.resolve(cfg, world=world))
    return {flow.kind: flow for flow in flows if flow.purpose == traffic.ROUTER_SELECTION}


def test_traffic_does_not_grow_with_the_scores(cfg_of):
    """XL's race on 64 ranks: 40 KiB of counts in a layer's forward pass, and 32 x 32 counts for its loss, however many images."""
    for batch, passes in ((1024, 1), (4096, 4)):
        words = (
            "moe=expert_race",
            "moe.num_experts=32",
            "parallel=fsdp",
            f"train.global_batch={batch}",
            "train.microbatch=16",
        )
        cfg = cfg_of("ec_dit_xl_8e", *words, "parallel.activation_checkpointing=selective")
        flows = selection_flows(cfg, 64)
        calls = 28 * passes
        assert flows["all_reduce"].message == calls * (2**14 + 2**14 + 2**13 + 8 * 32**2)
        assert flows["all_reduce"].calls == calls * 4
        assert flows["all_gather"].message == calls * 8 * 64
        assert flows["all_reduce"].ranks == 64


@pytest.mark.parametrize(("mode", "times"), [("none", 1), ("selective", 1), ("full", 2)])
def test_only_full_checkpointing_selects_again(cfg_of, mode, times):
    words = ("moe=expert_race", "train.microbatch=16", f"parallel.activation_checkpointing={mode}", "parallel.tp=2",
             "parallel.overlap_chunks=1")  # fmt: skip
    flows = selection_flows(cfg_of("ec_dit_xl_8e", *words, "parallel.ep=8"), 16)
    assert flows["all_reduce"].calls == times * 4 * 28 * (4096 // (8 * 16))
    assert flows["all_reduce"].ranks == 8


@pytest.mark.parametrize("moe", ["le", "tc", "expert_choice", "threshold", "dense"])
def test_nothing_is_sent_where_ranks_do_not_compete(cfg_of, moe):
    words = (f"moe={moe}", "parallel=fsdp", "train.microbatch=16")
    assert selection_flows(cfg_of("ec_dit_xl_8e", *words), 8) == {}


SMALL = ("experiment=ec_dit_xl_8e", "model.layers=4", "train.microbatch=32", "train.global_batch=256")
LAYOUTS = {
    "race_full": ("moe=expert_race", "parallel=fsdp", "parallel.activation_checkpointing=full", "parallel.overlap_chunks=1"),
    "race_tp2_ep2": ("moe=expert_race", "parallel=tp2_ep8", "parallel.ep=2", "parallel.activation_checkpointing=selective",
                     "parallel.overlap_chunks=1"),
    "be_replicas": ("moe=be", "parallel=fsdp", "parallel.dp_replicate=2", "parallel.activation_checkpointing=none",
                    "parallel.overlap_chunks=1"),
}  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param("race_full", marks=pytest.mark.slow), "race_tp2_ep2", "be_replicas"])
def test_dry_runs_agree(name):
    peak = "peak of forward and backward"
    found = by_name(dry_run(*SMALL, *LAYOUTS[name], world=8, except_for=(peak,)))
    assert -0.10 <= found[peak]["relative"] < 0.25
    for kind in ("all_reduce", "all_gather"):
        row = found[f"routers' {kind}"]
        assert row["formula"] == row["measured"] > 0

"""Dry runs of the real parallelisation on fake ranks, held against the plan's formulas. Each owns a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from cli_commands import refused

from ecdit_train.plan.dry_run import Difference

PEAK = "peak of forward and backward"


def plan(*words, world):
    """`ecdit plan --dry-run` in a process of its own."""
    command = [sys.executable, "-c", "from ecdit_train.cli import main; main()", "plan", "--dry-run"]
    return subprocess.run([*command, f"--world={world}", *words], capture_output=True, text=True, timeout=600)


def dry_run(*words, world, except_for=()):
    """The dry run's JSON; fails the test unless formulas and dry run agreed (exit code 0) on all but `except_for`."""
    done = plan(*words, "--json", world=world)
    assert done.stdout, done.stderr[-3000:]
    tree = json.loads(done.stdout)
    off = [d for d in tree["differences"] if not d["within"]]
    assert [d for d in off if d["name"] not in except_for] == []
    assert done.returncode == int(bool(off))
    return tree


def by_name(tree):
    return {d["name"]: d for d in tree["differences"]}


# Small in depth, whole in kind: both views of the ranks, two chunks in flight, selective checkpointing, replicas.
LAYOUTS = {
    "ep8": ("parallel.overlap_chunks=2",),
    "tp2_ep2_hybrid": (
        *("parallel=tp2_ep8", "parallel.ep=2", "parallel.dp_replicate=2"),
        "parallel.activation_checkpointing=none",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_eight_ranks(layout):
    small = ("experiment=ec_dit_xl_8e", "model.layers=4", "train.microbatch=32")
    tree = dry_run(*small, "train.global_batch=256", *LAYOUTS[layout], world=8, except_for=(PEAK,))
    found = by_name(tree)
    # With four layers, buffers that never meet weigh more than activations.
    assert -0.10 <= found[PEAK]["relative"] < 0.25
    exact = {"all_gather", "reduce_scatter", "all_to_all", "parameters", "gradients", "optimizer"}
    for name in exact | ({"all_reduce"} & set(found)):
        assert abs(found[name]["relative"]) < 0.005, found[name]
    assert "broadcast" not in found  # comes with clipping, after backward
    assert ("all_reduce" in found) == layout.startswith("tp2")
    ranks = {(c["kind"], c["ranks"]) for c in tree["dry_run"]["collectives"]}
    assert ("all_to_all", 2 if layout.startswith("tp2") else 8) in ranks


@pytest.mark.parametrize(
    "moe",
    [("moe=nucleus", "moe.router.schedule=[[9,4.0]]"), pytest.param(("moe=diffmoe",), marks=pytest.mark.slow)],
    ids=lambda w: w[0],
)
def test_routers_shared_and_gated_experts(moe):
    """What they keep and send, on every axis; of two stages the one with more experts per token is run."""
    words = (
        "experiment=ec_dit_xl_8e",
        "model.layers=4",
        "train.microbatch=32",
        "train.global_batch=256",
        "parallel.tp=2",
        "parallel.overlap_chunks=1",
    )
    tree = dry_run(*words, "parallel.activation_checkpointing=none", *moe, world=8)
    for name in ("all_gather", "reduce_scatter", "all_to_all", "all_reduce", "parameters", "gradients", "optimizer"):
        assert abs(by_name(tree)[name]["relative"]) < 0.005, name
    assert abs(by_name(tree)["activations kept"]["relative"]) < 0.03


@pytest.mark.parametrize(
    "optim", [("optim/optimizer=rmsprop", "optim.optimizer.momentum=0"), ("optim/optimizer=adamw",)]
)
def test_the_optimizer_is_the_runs_own(optim):
    found = by_name(dry_run("experiment=shapes_tiny", *optim, world=2))["optimizer"]
    assert found["formula"] == found["measured"] > 0


@pytest.mark.parametrize("recipe", ["delayed", "mxfp8"])
def test_what_only_a_gpu_multiplies_is_planned_without_one(recipe):
    words = ("train.precision=fp8", "train.fp8_backend=transformer_engine", f"train.fp8_recipe={recipe}")
    found = by_name(dry_run("experiment=shapes_tiny", *words, world=2, except_for=(PEAK,)))
    assert found["activations kept"]["measured"] > 0


NEW = {
    "lean_half": ("moe.form=lean", "parallel.activation_checkpointing=selective", "parallel.keep=[attention]",
                  "parallel.checkpoint_blocks=0.5", "parallel.overlap_chunks=2"),
    "kept_by_node": ("cluster.gpus_per_node=4", "parallel.exchange=hierarchical", "parallel.reshard_after_forward=dense",
                     "parallel.activation_checkpointing=selective", "parallel.keep=[projections,feed_forward,experts]"),
    "two_microbatches": ("parallel.ep=2", "parallel.dp_replicate=2", "parallel.replicate_experts=true",
                         "parallel.reduce_gradients=microbatch", "train.global_batch=512"),
}  # fmt: skip


@pytest.mark.parametrize(
    "layout", [pytest.param("two_microbatches", marks=pytest.mark.slow), "lean_half", "kept_by_node"]
)
def test_what_a_step_keeps_reduces_and_sends(layout):
    words = (
        "experiment=ec_dit_xl_8e",
        "model.layers=4",
        "train.microbatch=32",
        "train.global_batch=256",
        "parallel.overlap_chunks=1",
    )
    found = by_name(dry_run(*words, *NEW[layout], world=8, except_for=(PEAK,)))
    assert -0.10 <= found[PEAK]["relative"] < 0.25
    for name in (
        "all_gather",
        "reduce_scatter",
        "all_to_all",
        "parameters",
        "gradients",
        "gathered between forward and backward",
    ):
        assert abs(found[name]["relative"]) < 0.005, name
    assert abs(found["activations kept"]["relative"]) < 0.03


FP8 = {
    "matrices": ("parallel.tp=2", "parallel.ep=2", "parallel.dp_replicate=2", "parallel.keep=[attention,experts]"),
    "experts": ("parallel.ep=8", "parallel.overlap_chunks=2", "parallel.keep=[projections,feed_forward]"),
    "remembered": ("parallel.ep=8", "train.fp8_recipe=delayed", "parallel.activation_checkpointing=none"),
    "emulated": ("parallel.ep=8", "train.fp8_backend=emulated", "parallel.keep=[attention,experts]"),
    "never_alone": ("parallel.ep=8", "train.fp8_backend=emulated", "parallel.keep=[projections,feed_forward]"),
    "blocks": ("parallel.ep=8", "train.fp8_recipe=mxfp8", "train.fp8_backend=emulated",
               "parallel.activation_checkpointing=none"),
}  # fmt: skip


@pytest.mark.parametrize(
    "layout", [name if name == "matrices" else pytest.param(name, marks=pytest.mark.slow) for name in FP8]
)
def test_eight_bits(layout):
    """What is kept, also where blocks are repeated but for some products, and how often tp ranks agree on a scale."""
    words = (
        *("experiment=ec_dit_xl_8e", "model.layers=4", "train.microbatch=32", "train.global_batch=256"),
        *("parallel=single", "parallel.compile=false", "parallel.overlap_chunks=1", "moe.form=plain"),
        *("parallel.activation_checkpointing=selective", "train.precision=fp8"),
    )
    tree = dry_run(*words, *FP8[layout], world=8, except_for=(PEAK,))
    found = by_name(tree)
    assert -0.10 <= found[PEAK]["relative"] < 0.25
    assert abs(found["activations kept"]["relative"]) < 0.03
    for name in ("all_gather", "reduce_scatter", "all_to_all", "parameters", "gradients"):
        assert abs(found[name]["relative"]) < 0.005, name
    flows = [f for f in tree["traffic_per_step"]["flows"] if (f["kind"], f["axis"]) == ("all_reduce", "tp")]
    ran = tree["dry_run"]["collectives"]
    calls = sum(c["calls"] for c in ran if (c["kind"], c["ranks"]) == ("all_reduce", 2) and layout == "matrices")
    replicas = sum(f["calls"] for f in tree["traffic_per_step"]["flows"] if f["axis"].endswith("_replicate"))
    assert calls == (sum(f["calls"] for f in flows) + replicas if flows else 0)
    # Ten linear layers of a dense block and eight of a sparse one; x, W and the gradient, and x and W again; two microbatches.
    said = [f["calls"] for f in flows if f["purpose"] == "scales of 8-bit operands"]
    assert said == ([2 * 2 * 18 * 5] if layout == "matrices" else [])


EP64 = ("parallel=ep64", "parallel.exchange=flat", "parallel.overlap_chunks=1", "parallel.reshard_after_forward=all")


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("parallel.activation_checkpointing=selective",),
        (),
        ("moe.form=lean", "parallel.activation_checkpointing=selective", "parallel.keep=[attention,projections]",
         "parallel.checkpoint_blocks=0.5"),
    ],
)  # fmt: skip
def test_m_64e_on_512_ranks(words):
    """97 billion parameters, every collective of 512 ranks, in under five minutes and under 16 GB."""
    words = ("experiment=ec_dit_m_64e", *EP64, *words, "train.global_batch=8192")
    tree = dry_run(*words, "train.microbatch=16", world=512)
    run = tree["dry_run"]
    assert run["seconds"] < 300
    assert run["resident"] < 16e9
    assert {d["name"] for d in tree["differences"]} >= {"all_gather", "reduce_scatter", "all_to_all"}
    sizes = {(c["kind"], c["ranks"]) for c in run["collectives"]}
    assert sizes == {
        *(("all_gather", 512), ("reduce_scatter", 512), ("all_to_all", 64)),
        *(("all_gather", 8), ("reduce_scatter", 8)),
    }
    calls = {(c["kind"], c["ranks"]): c["calls"] for c in run["collectives"]}
    assert calls["all_to_all", 64] == (6 if "moe.form=lean" in words else 4) * 19
    assert calls["all_gather", 8] == 2 * 19
    assert calls["reduce_scatter", 512] == 1 + 38 + 19


EIGHT_BITS = ("experiment=ec_dit_xl_8e", "train.precision=fp8", "parallel.compile=false", "moe.form=plain")


@pytest.mark.slow
def test_every_kind_of_layout_stays_within_the_tolerance():
    for words, world in (
        (("experiment=ec_dit_xl_8e",), 8),
        (("experiment=dense_xl",), 8),
        (("experiment=gshard_xl_16e",), 16),
        (("experiment=ec_dit_3xl_16e", "parallel=tp2_ep8"), 32),
        (("experiment=ec_dit_m_64e", "parallel=fsdp"), 64),
        ((*EIGHT_BITS, "model.layers=12", "train.global_batch=1024"), 8),
    ):
        dry_run(*words, world=world)


def test_refuses_one_rank_and_bad_layouts(capsys):
    for words, world, text in (
        (("parallel.ep=1",), 1, "at least two ranks"),
        (("parallel.ep=3",), 8, "parallel.ep = 3"),
        (("parallel.ep=1",), 0, "world = 0: must be at least 1; nearest valid: 1"),
    ):
        code, said = refused(capsys, "plan", "--dry-run", f"--world={world}", "experiment=ec_dit_xl_8e", *words)
        assert code == 77
        assert text in "\n".join(said)


def test_difference():
    assert Difference(name="a", formula=0, measured=0).within
    assert not Difference(name="a", formula=1, measured=0).within
    assert Difference(name="a", formula=109, measured=100).within
    assert not Difference(name="a", formula=111, measured=100).within

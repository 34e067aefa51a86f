"""What a resume may change."""

from __future__ import annotations

import pytest

from ecdit_train.config import compose
from ecdit_train.config.compat import Change, check_resume, classes, diff, kind
from ecdit_train.config.convert import key_types, with_values
from ecdit_train.errors import RunFolderError


def test_every_key_has_a_class(base):
    assert set(classes(base)) == set(key_types(base))


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("model.layers", "identity"),
        ("moe.num_experts", "identity"),
        ("moe.router._target_", "identity"),
        ("moe.router.capacity_factor", "identity"),
        ("moe.dispatcher._target_", "free"),
        ("diffusion.mask_ratio", "identity"),
        ("encoders.text.width", "identity"),
        ("encoders.text.path", "free"),
        ("encoders.image.parameters", "free"),
        ("encoders.text._target_", "identity"),
        ("observe.sinks.wandb.mode", "free"),
        ("config_dir", "free"),
        ("encoders.image.scale", "identity"),
        ("data.resolution", "identity"),
        ("data.shards", "free"),
        ("train.seed", "identity"),
        ("train.global_batch", "identity"),
        ("train.microbatch", "free"),
        ("train.steps", "schedule"),
        ("optim.optimizer._target_", "identity"),
        ("optim.optimizer.decay", "schedule"),
        ("optim.lr", "schedule"),
        ("optim.warmup_steps", "schedule"),
        ("parallel.tp", "free"),
        ("cluster.nodes", "free"),
        ("sample.scope", "free"),
        ("run", "free"),
    ],
)
def test_class(base, key, kind):
    assert classes(base)[key] == kind


def test_equal_configurations_differ_in_nothing(base):
    assert diff(base, base) == []
    assert check_resume(base, base) == []


def test_diff_lists_changes_in_order(base):
    new = with_values(base, {"parallel.tp": 2, "model.layers": 30, "optim.lr": 1e-3})
    assert diff(base, new) == [
        Change(field="model.layers", old=28, new=30, kind="identity"),
        Change(field="optim.lr", old=1e-4, new=1e-3, kind="schedule"),
        Change(field="parallel.tp", old=1, new=2, kind="free"),
    ]


def test_free_changes_pass(base):
    new = with_values(base, {"parallel.ep": 8, "run": "elsewhere", "cluster.nodes": 2, "train.microbatch": 8})
    assert {c.field for c in check_resume(base, new)} == {"parallel.ep", "run", "cluster.nodes", "train.microbatch"}


def test_schedule_changes_must_be_asked_for(base):
    new = with_values(base, {"train.steps": 9, "optim.lr": 1e-3})
    assert len(check_resume(base, new, {"train.steps", "optim.lr"})) == 2
    with pytest.raises(RunFolderError) as caught:
        check_resume(base, new, {"train.steps"})
    assert str(caught.value) == (
        "runs/default cannot be resumed with this configuration:\n"
        "optim.lr: 0.0001 -> 0.001 (schedule): give optim.lr=0.001 on the command line if you mean it"
    )


def test_identity_changes_are_all_listed_and_never_allowed(base):
    new = with_values(
        base,
        {
            "model.layers": 30,
            "train.seed": 1,
            "moe.dispatcher._target_": "ecdit_train.model.dispatchers.deterministic.Deterministic",
        },
    )
    with pytest.raises(RunFolderError) as caught:
        check_resume(base, new, {"model.layers", "train.seed"})
    assert str(caught.value).splitlines() == [
        "runs/default cannot be resumed with this configuration:",
        "model.layers: 28 -> 30 (identity): another run; start a new run folder for it",
        "train.seed: 0 -> 1 (identity): another run; start a new run folder for it",
    ]


@pytest.mark.parametrize(("dense", "kind"), [({}, "identity"), ({"moe.router": None}, "free")])
def test_microbatch_is_identity_where_it_is_the_group(base, dense, kind):
    old = with_values(base, {"moe.scope": "batch", **dense})
    (change,) = diff(old, with_values(old, {"train.microbatch": 8}))
    assert change.kind == kind


def test_explicit_keys_are_those_that_words_name():
    keys = compose.explicit_keys(["experiment=shapes_tiny", "optim=adamw", "train.steps=3"])
    assert "train.steps" in keys
    assert {"optim.lr", "optim.ema_decay"} <= keys
    assert "train.seed" not in keys


@pytest.mark.parametrize("key", ["optim.ema_decay", "optim.optimizer.momentum"])
def test_state_that_appears_or_vanishes_is_identity(key):
    old = compose.compose(["experiment=dense_xl"])
    assert kind(key, old=old, new=with_values(old, {key: 0.0})) == "identity"
    assert kind(key, old=old, new=with_values(old, {key: 0.5})) == "schedule"


@pytest.mark.parametrize("key", ["modulation", "unnamed"])
def test_an_optimizer_says_which_keys_decide_its_state(key):
    old = compose.compose(["experiment=dense_xl", "optim=muon"])
    key = f"optim.optimizer.{key}"
    assert classes(old)[key] == kind(key, old=old, new=with_values(old, {key: "muon"})) == "identity"
    assert classes(old)["optim.optimizer.ns_steps"] == "schedule"

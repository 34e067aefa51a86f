"""A run against its own divergence: updates left out, going back, and the budget of both."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_runs import assert_same, configure, live, records, steady

from ecdit_train import checkpoint
from ecdit_train.checkpoint import restore
from ecdit_train.config.compose import compose
from ecdit_train.errors import NonFiniteError
from ecdit_train.parallel.runtime import alone
from ecdit_train.run_folder import CHECKPOINTS
from ecdit_train.train.device_guard import LEAST
from ecdit_train.train.guard import Guard
from ecdit_train.train.step import Numbers

SKIP = ("health.non_finite=skip", "checkpoint.keep=9")


def poison(*batches, value=float("nan")):
    """The latents of these global batches of the data (counted from 0) are spoiled."""

    def meddle(trainer):
        encode, whole = trainer.batches.encode, trainer.config.train.global_batch

        def spoiled(raw):
            batch = encode(raw)
            if int(batch.position_B[0]) // whole in batches:
                batch.latents_BCHW.mul_(value)
            return batch

        trainer.batches.encode = spoiled

    return meddle


def leave_out(*batches):
    """The data without these global batches: the run that a skip must equal."""

    def meddle(trainer):
        fetch, whole = trainer.batches.fetch, trainer.config.train.global_batch

        def without():
            raw = fetch()
            while int(raw.position[0]) // whole in batches:
                trainer.batches.encode(raw)
                raw = fetch()
            return raw

        trainer.batches.fetch = without

    return meddle


def both(*meddles):
    return lambda trainer: [meddle(trainer) for meddle in meddles]


def but_images(lines):
    """Records without the count of images, which a skipped batch belongs to, and what tells of it."""
    gone = ("train/images", "reliability/")
    return [{k: v for k, v in line.items() if not k.startswith(gone)} for line in steady(lines)]


def test_a_skipped_batch_is_as_if_it_were_not_in_the_data(tiny_shards, tmp_path, capsys):
    skipped = live(configure(tmp_path / "skip", tiny_shards, *SKIP), before=poison(3, 7))
    said = capsys.readouterr().out
    truth = live(configure(tmp_path / "truth", tiny_shards, *SKIP), before=leave_out(3, 7))
    assert skipped.finished
    assert_same(skipped.tensors, truth.tensors)
    assert but_images(records(tmp_path / "skip")) == but_images(records(tmp_path / "truth"))
    assert "step 4: left out samples 24 to 31: loss nan" in said
    assert "step 7: left out samples 56 to 63: loss nan" in said
    last = records(tmp_path / "skip")[-1]
    assert (last["reliability/skipped"], last["train/images"]) == (2, (12 + 2) * 8)


def test_a_skip_is_remembered_by_the_next_life(tiny_shards, tmp_path):
    """Stopped between two skips and resumed: the same run, and the budget counts both."""
    words = (*SKIP, "health.max_skips=1")
    config = configure(tmp_path, tiny_shards, *words)
    assert not live(config, before=poison(3), stop_after=5).finished
    notes = restore.read_objects(checkpoint.newest(tmp_path / CHECKPOINTS))["guard"]["skipped"]
    assert [(s["step"], s["first"], s["last"], s["act"]) for s in notes] == [(4, 24, 31, "skip")]
    assert json.dumps(notes)
    with pytest.raises(
        NonFiniteError, match=r"step 7, samples 56 to 63: .*; 2 updates in 1000 steps, health.max_skips = 1"
    ):
        live(config, before=poison(7))


def test_going_back_leaves_the_window_out_and_goes_on(tiny_shards, tmp_path, capsys):
    """Checkpoints at 4 and 8; batch 6 (step 7) is bad: back to step 4, on with batch 7. As if 4 to 6 were not in the data."""
    words = ("health.non_finite=roll_back", "checkpoint.keep=9")
    back = live(configure(tmp_path / "back", tiny_shards, *words), before=poison(6))
    assert "step 7: back to step 4, and on with the samples after 55: loss nan" in capsys.readouterr().out
    truth = live(configure(tmp_path / "truth", tiny_shards, *words), before=leave_out(4, 5, 6))
    assert_same(back.tensors, truth.tensors)
    lines = records(tmp_path / "back")
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [line["train/loss"] for line in lines] == [line["train/loss"] for line in records(tmp_path / "truth")]
    assert lines[-1]["reliability/roll_backs"] == 1


def test_going_back_has_a_budget_and_needs_a_checkpoint(tiny_shards, tmp_path):
    words = ("health.non_finite=roll_back", "health.max_roll_backs=2")
    with pytest.raises(NonFiniteError, match=r"samples 64 to 71: .*went back 2 times \(health.max_roll_backs\)"):
        live(configure(tmp_path / "often", tiny_shards, *words), before=poison(6, 7, 8))
    with pytest.raises(NonFiniteError, match=r"step 2, samples 8 to 15: .*there is no checkpoint to go back to"):
        live(configure(tmp_path / "early", tiny_shards, *words), before=poison(1))


class Alone:
    def any_rank(self, flags):
        return flags


def judge(guard, loss):
    """As a step does: the device's word, then the host's."""
    refuse, (strange, spike) = guard.device.judge(loss=torch.tensor(loss), finite=torch.tensor(True), parallel=Alone())
    about = {"own_finite": True, "finite": not strange, "spike": bool(spike), "applied": not refuse}
    verdict = guard.judge(Numbers(loss=loss, auxiliary={}, grad_norm=1.0, **about))
    if refuse:
        guard.go_on()
    return verdict


@pytest.mark.parametrize("policy", ["ignore", "report", "skip", "roll_back"])
def test_a_spike_is_far_above_the_median_of_the_last_losses(policy):
    health = compose(["experiment=shapes_tiny", f"health.spike={policy}", "health.spike_window=32"], local=False).health
    guard = Guard(health, runtime=alone())
    noisy = [1 + 0.01 * (n % 5 - 2) for n in range(200)]
    assert {judge(guard, loss).act for loss in [5.0, *noisy]} == {"update"}, "the first losses have no median"
    assert judge(guard, 1.1).act == "update"  # 7 robust deviations
    verdict = judge(guard, 1.2)
    assert verdict.act == ("update" if policy == "ignore" else policy)
    assert ("deviations above the median" in verdict.words) == (policy != "ignore")
    assert judge(guard, 0.1).act == "update", "better is no spike"


def test_a_spike_needs_a_median_and_leaves_none_of_itself_behind():
    health = compose(["experiment=shapes_tiny", "health.spike=skip"], local=False).health
    guard = Guard(health, runtime=alone())
    assert {judge(guard, 1.0 + n / 100).act for n in range(LEAST)} == {"update"}
    assert [judge(guard, 50.0).act for _ in range(200)] == ["skip"] * 200
    again = Guard(health, runtime=alone())
    again.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert judge(again, 50.0).act == "skip"
    assert judge(again, 1.0).act == "update"


def test_a_spike_in_a_run_is_skipped_before_its_update(tiny_shards, tmp_path, capsys):
    words = ("health.spike=skip", "train.steps=24", "checkpoint.keep=9", "checkpoint.every_steps=50", "optim.lr=1e-5")
    far = live(configure(tmp_path / "spike", tiny_shards, *words), before=poison(20, value=100.0))
    assert "step 21: left out samples 160 to 167: loss" in capsys.readouterr().out
    truth = live(configure(tmp_path / "truth", tiny_shards, *words), before=leave_out(20))
    assert_same(far.tensors, truth.tensors)

"""Steps whose numbers are read one step later: the same run as one that waits, whatever goes wrong."""

from __future__ import annotations

import pytest
import torch
from test_guard import leave_out, poison
from tiny_runs import PowerCut, assert_same, configure, live, records
from torch.utils._python_dispatch import TorchDispatchMode

from ecdit_train.errors import NonFiniteError
from ecdit_train.train.device_guard import Reading
from ecdit_train.train.state import TrainState

RMSPROP, ADAMW, MUON = ("optim=rmsprop", "optim.ema_decay=0.99"), ("optim=adamw",), ("optim=muon",)
SELDOM = ("observe.log_every=50", "checkpoint.every_steps=50", "health.digest_every=0", "optim.lr=1e-3")
"""Nothing asks for a state at rest before the last step."""
EVERY = ("observe.log_every=1",)


@pytest.mark.parametrize("optim", [RMSPROP, ADAMW], ids=["rmsprop", "adamw"])
@pytest.mark.parametrize("router", ["expert_choice", "threshold"])
def test_one_step_behind_or_waiting_is_one_run(optim, router, tiny_shards, tmp_path, monkeypatch):
    """Numbers read late, numbers read at once, and an optimizer that nobody may refuse: the same bits."""
    words = (f"moe={router}", *optim, *SELDOM)
    late = live(configure(tmp_path / "late", tiny_shards, *words))
    at_once = live(configure(tmp_path / "at_once", tiny_shards, *words, *EVERY))
    monkeypatch.setattr(TrainState, "guarded", False)
    waited = live(configure(tmp_path / "waited", tiny_shards, *words))
    assert_same(late.tensors, at_once.tensors)
    assert_same(late.tensors, waited.tensors)


class Order:
    """When steps are issued and when their numbers are read."""

    def __init__(self):
        self.said = []

    def __call__(self, trainer):
        step = trainer._step

        def noted(taken):
            step(taken)
            self.said.append(("issued", trainer.state.step))
            numbers = trainer._under_way[-1].issued.reading
            get, number = numbers.get, trainer.state.step
            numbers.get = lambda: (self.said.append(("read", number)), get())[1]

        trainer._step = noted


def test_numbers_are_read_when_the_next_step_is_under_way_and_at_once_where_a_state_is_used(tiny_shards, tmp_path):
    order = Order()
    live(configure(tmp_path, tiny_shards, *SELDOM, "train.steps=6", "checkpoint.every_steps=4"), before=order)
    assert order.said == [
        *(("issued", 1), ("issued", 2), ("read", 1), ("issued", 3), ("read", 2), ("issued", 4), ("read", 3), ("read", 4)),
        *(("issued", 5), ("issued", 6), ("read", 5), ("read", 6)),
    ]  # fmt: skip


@pytest.mark.parametrize("optim", [RMSPROP, ADAMW, MUON], ids=["rmsprop", "adamw", "muon"])
def test_a_batch_skipped_a_step_late_is_as_if_it_were_not_in_the_data(optim, tiny_shards, tmp_path, capsys):
    """Two that follow each other, and one alone; the steps issued meanwhile are done again, with the right rate and average."""
    words = (*SELDOM, *optim, "health.non_finite=skip")
    skipped = live(configure(tmp_path / "skip", tiny_shards, *words), before=poison(3, 4, 8))
    said = capsys.readouterr().out
    truth = live(configure(tmp_path / "truth", tiny_shards, *words), before=leave_out(3, 4, 8))
    assert skipped.finished
    assert_same(skipped.tensors, truth.tensors)
    assert "step 4: left out samples 24 to 31: loss nan" in said
    assert "step 4: left out samples 32 to 39: loss nan" in said
    assert "step 7: left out samples 64 to 71: loss nan" in said
    ours, theirs = records(tmp_path / "skip")[-1], records(tmp_path / "truth")[-1]
    assert ours["train/loss"] == theirs["train/loss"], "the window holds what was made, once"
    assert ours["reliability/skipped"] == 3
    assert ours["data/loader/samples"] == theirs["data/loader/samples"] == 15 * 8


def test_going_back_a_step_late(tiny_shards, tmp_path):
    words = (*SELDOM, "checkpoint.every_steps=4", "health.non_finite=roll_back", "checkpoint.keep=9")
    back = live(configure(tmp_path / "back", tiny_shards, *words), before=poison(6))
    truth = live(configure(tmp_path / "truth", tiny_shards, *words), before=leave_out(4, 5, 6))
    assert_same(back.tensors, truth.tensors)


@pytest.mark.parametrize("window", [17, 128])
def test_a_spike_is_refused_on_the_device_by_the_median_of_all_losses_before_it(window, tiny_shards, tmp_path, capsys):
    words = (*SELDOM, "train.steps=30", "health.spike=skip", f"health.spike_window={window}", "optim.lr=1e-5")
    far = live(configure(tmp_path / "late", tiny_shards, *words), before=poison(20, 24, value=100.0))
    said = capsys.readouterr().out
    assert "step 21: left out samples 160 to 167: loss" in said
    assert "step 24: left out samples 192 to 199: loss" in said
    assert_same(far.tensors, live(configure(tmp_path / "truth", tiny_shards, *words), before=leave_out(20, 24)).tensors)


@pytest.mark.parametrize("bad", [1, 6, 11])
def test_a_run_that_ends_has_nothing_wrong_in_it(bad, tiny_shards, tmp_path):
    """The step behind the bad one was issued; state, message and checkpoint are those of the step before it."""
    config, caught = configure(tmp_path / "bad", tiny_shards, *SELDOM), {}
    with pytest.raises(NonFiniteError, match=f"step {bad + 1}, samples {bad * 8} to {bad * 8 + 7}: loss nan") as error:
        live(config, before=lambda trainer: (caught.update(trainer=trainer), poison(bad)(trainer)))
    assert error.value.exit_code == 80
    sound = live(configure(tmp_path / "sound", tiny_shards, *SELDOM), stop_after=bad)
    assert caught["trainer"].state.step == bad
    assert_same({n: t.clone() for n, t in caught["trainer"].state.tensors().items()}, sound.tensors)


def test_a_save_is_of_what_was_trained_on(tiny_shards, tmp_path):
    """A batch is ahead at every save but the last one's; a run cut there goes on with it."""
    words = (*SELDOM, "checkpoint.every_steps=3", "checkpoint.keep=9")
    whole = live(configure(tmp_path / "whole", tiny_shards, *words))
    stopped = configure(tmp_path / "stopped", tiny_shards, *words)

    def meddle(trainer):
        step = trainer._step

        def cut(taken):
            if trainer.state.step == 7:
                raise PowerCut
            step(taken)

        trainer._step = cut

    assert not live(stopped, before=meddle).finished
    rest = live(stopped)
    assert [p for positions, _ in rest.seen for p in positions] == list(range(48, 96)), "on from the save of step 6"
    assert_same(rest.tensors, whole.tensors)


@pytest.mark.parametrize("where", ["fetch", "encode"])
def test_an_error_of_the_batch_ahead_comes_when_its_step_does(where, tiny_shards, tmp_path):
    """All of the step before it is done: its record, its save."""

    def meddle(trainer):
        real, calls = getattr(trainer.batches, where), [0]

        def torn(*args):
            calls[0] += 1
            if calls[0] == 5:
                raise PowerCut
            return real(*args)

        setattr(trainer.batches, where, torn)

    assert not live(configure(tmp_path, tiny_shards, "checkpoint.every_steps=4"), before=meddle).finished
    assert [line["step"] for line in records(tmp_path)] == [1, 2, 3, 4]
    assert (tmp_path / "checkpoints" / "step_00000004").exists()


class Reads(TorchDispatchMode):
    """Values that the host reads off tensors: on CUDA each would wait for the device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name in (
            "aten::_local_scalar_dense",
            "aten::nonzero",
            "aten::masked_select",
            "aten::is_nonzero",
            "aten::equal",
        ):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def test_no_step_between_records_reads_the_device(tiny_shards, tmp_path, monkeypatch):
    """Whole steps of the loop with loader, encoders and RMSProp: what is read are the numbers of the step before, once."""
    reads, steps, mode = [], [], Reads()
    for name in ("tolist", "numpy", "item", "cpu", "__bool__", "__float__", "__int__"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda t, *a, real=real, name=name, **k: (reads.append(name), real(t, *a, **k))[1]
        )
    get = Reading.get

    def allowed(reading):
        before = len(reads)
        values = get(reading)
        del reads[before:]
        reads.append("numbers")
        return values

    monkeypatch.setattr(Reading, "get", allowed)

    def meddle(trainer):
        step = trainer._step

        def noted(taken):
            if trainer.state.step == 3:
                mode.__enter__()
            if trainer.state.step >= 3:
                steps.append(list(reads))
            if trainer.state.step == 9:
                mode.__exit__(None, None, None)
            reads.clear()
            step(taken)

        trainer._step = noted

    live(configure(tmp_path, tiny_shards, *RMSPROP, *SELDOM), before=meddle)
    assert steps[1:] == [["numbers"]] * len(steps[1:])
    assert len(steps) > 6
    assert mode.found == []

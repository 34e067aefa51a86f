"""The loop: being asked to stop, what is logged and when, and what is saved."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys

import pytest
from tiny_runs import ROUTERS, assert_same, configure, live, records

from ecdit_train.errors import NonFiniteError
from ecdit_train.observe.metrics import undocumented
from ecdit_train.train.stop import StopRequest


@pytest.mark.parametrize("number", StopRequest.SIGNALS, ids=lambda s: s.name)
def test_a_signal_sets_the_flag(number):
    with StopRequest() as stop:
        assert stop.name is None
        os.kill(os.getpid(), number)
        assert stop.name == number.name


def test_handlers_come_back():
    before = [signal.getsignal(s) for s in StopRequest.SIGNALS]
    with StopRequest():
        assert [signal.getsignal(s) for s in StopRequest.SIGNALS] != before
    assert [signal.getsignal(s) for s in StopRequest.SIGNALS] == before


def test_only_a_second_interrupt_from_the_keyboard_kills():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR2)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.name == "SIGUSR2"


def test_listening_needs_no_torch():
    code = "import sys, ecdit_train.train.stop; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("router", ROUTERS)
def test_everything_logged_is_documented(router, tiny_shards, tmp_path):
    live(configure(tmp_path, tiny_shards, *ROUTERS[router], "train.steps=4", "observe.log_every=2"))
    lines = records(tmp_path)
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        names = {k: v for k, v in line.items() if k not in ("step", "time")}
        assert not undocumented(names)
        assert all(math.isfinite(v) for v in names.values())
        wanted = {"train/loss", "optim/lr", "optim/grad_norm", "perf/images_per_s", "perf/step_s", "data/stall_frac"}
        assert names.keys() >= wanted
        assert any(name.startswith("moe/") for name in names) == (router != "dense")
        assert ("train/balance_loss" in names) == (router == "token_choice")


def test_a_record_is_the_mean_of_its_steps(tiny_shards, tmp_path):
    live(configure(tmp_path / "each", tiny_shards, "train.steps=7"))
    live(configure(tmp_path / "some", tiny_shards, "train.steps=7", "observe.log_every=3"))
    each = [line["train/loss"] for line in records(tmp_path / "each")]
    lines = records(tmp_path / "some")
    assert [line["step"] for line in lines] == [3, 6, 7]
    means = [sum(each[:3]) / 3, sum(each[3:6]) / 3, each[6]]
    assert [line["train/loss"] for line in lines] == pytest.approx(means, rel=1e-6)


def test_checkpoints_at_the_interval_and_the_end(tiny_shards, tmp_path):
    live(configure(tmp_path, tiny_shards, "train.steps=10", "checkpoint.keep=9"))
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("step_*")) == [
        "step_00000004", "step_00000008", "step_00000010"]  # fmt: skip


def test_non_finite_ends_the_run_before_the_update(tiny_shards, tmp_path):
    """The last committed step stays; the message names the step and its samples; threads and files are closed."""
    caught = {}

    def meddle(loop):
        take, caught["loop"] = loop._step, loop

        def poisoned(batch):
            if loop.state.step == 5:
                batch.latents_BCHW[0] = float("inf")
                caught["before"] = {n: t.clone() for n, t in loop.state.tensors().items()}
            return take(batch)

        loop._step = poisoned

    with pytest.raises(NonFiniteError, match="step 5, samples 40 to 47: loss") as error:
        live(configure(tmp_path, tiny_shards), before=meddle)
    assert error.value.exit_code == 80
    assert_same(caught["before"], caught["loop"].state.tensors())
    assert caught["loop"].state.step == 5
    assert [line["step"] for line in records(tmp_path)] == [1, 2, 3, 4, 5]
    assert [p.name for p in (tmp_path / "checkpoints").glob("step_*")] == ["step_00000004"]
    assert live(configure(tmp_path, tiny_shards)).finished  # the poison was ours: the run goes on from step 4

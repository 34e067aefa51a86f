"""Stopped anywhere, in any way, and resumed: losses, weights, optimizer state, average and sample order are those of
the run that was never stopped, bit for bit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_runs import ROUTERS, Life, assert_same, configure, cut_power, live, records, steady, words

from ecdit_train.errors import ConfigError

STEPS = 12
RUNS = {
    **ROUTERS,
    "deterministic": ("moe/dispatcher=deterministic",),
    "rmsprop": (
        "optim/optimizer=rmsprop",
        "optim.lr=1e-4",
        "optim.optimizer.decay=0.9",
        "optim.optimizer.momentum=0.9",
    ),
    "bf16": ("train.precision=bf16",),
}


@pytest.fixture(scope="module")
def undisturbed(tiny_shards, tmp_path_factory):
    """The run that was never stopped, by its name in RUNS: its life and its records. Made when first asked for."""
    made: dict[str, tuple[Life, list]] = {}

    def get(name: str) -> tuple[Life, list]:
        if name not in made:
            run = tmp_path_factory.mktemp(f"undisturbed-{name}")
            life = live(configure(run, tiny_shards, *RUNS[name]))
            assert life.finished
            made[name] = life, records(run)
        return made[name]

    return get


def check(run: Path, lives: list[Life], truth: tuple[Life, list], *, seen: list | None = None) -> None:
    """The lives together are the undisturbed run."""
    whole, lines = truth
    assert [life.finished for life in lives] == [False] * (len(lives) - 1) + [True]
    assert [line["step"] for line in records(run)] == list(range(1, STEPS + 1))
    assert steady(records(run)) == steady(lines)
    assert_same(lives[-1].tensors, whole.tensors)
    assert (seen if seen is not None else [batch for life in lives for batch in life.seen]) == whole.seen


STOPS = [*(("expert_choice", (stop,)) for stop in (1, 4, 11)), *((name, (2, 3, 9)) for name in RUNS)]


@pytest.mark.parametrize(("name", "stops"), STOPS, ids=str)
def test_stopped_and_resumed(name, stops, undisturbed, tiny_shards, tmp_path):
    config = configure(tmp_path, tiny_shards, *RUNS[name])
    lives = [live(config, stop_after=stop) for stop in (*stops, None)]
    assert [life.step for life in lives] == [*stops, STEPS]
    check(tmp_path, lives, undisturbed(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("stop", range(1, STEPS))
def test_stopped_at_every_step(name, stop, undisturbed, tiny_shards, tmp_path):
    config = configure(tmp_path, tiny_shards, *RUNS[name])
    check(tmp_path, [live(config, stop_after=stop), live(config)], undisturbed(name))


@pytest.mark.parametrize(
    ("name", "cut"),
    [
        ("expert_choice", 3),
        ("expert_choice", 7),
        ("expert_choice", 12),
        pytest.param("bf16", 7, marks=pytest.mark.slow),
    ],
)
def test_power_cut(name, cut, undisturbed, tiny_shards, tmp_path):
    """Nothing is saved at the cut: the run goes back to its last committed step and does the rest again, alike."""
    config = configure(tmp_path, tiny_shards, *RUNS[name])
    first, second = live(config, before=cut_power(cut)), live(config)
    assert first.step == cut
    committed = (cut - 1) // 4 * 4
    assert len(second.seen) == STEPS - committed
    check(tmp_path, [first, second], undisturbed(name), seen=first.seen[:committed] + second.seen)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2], ids=lambda s: s.name)
def test_signal_in_a_step(number, undisturbed, tiny_shards, tmp_path, capsys):
    """The step under way is finished, saved, and the way on is said."""
    config = configure(tmp_path, tiny_shards)

    def meddle(trainer):
        step = trainer._step
        trainer._step = lambda taken: (
            trainer.state.step == 5 and os.kill(os.getpid(), number),
            step(taken),
        )[1]

    first = live(config, before=meddle)
    assert first.step == 6
    said = f"stopped by {number.name} after step 6, everything saved; go on with: ecdit resume {tmp_path}"
    assert said in capsys.readouterr().out
    check(tmp_path, [first, live(config)], undisturbed("expert_choice"))


def test_signal_before_the_first_step(undisturbed, tiny_shards, tmp_path):
    """A request that comes while the run is being built is met after one step: every life moves the run on."""
    config = configure(tmp_path, tiny_shards)
    first = live(config, before=lambda _: os.kill(os.getpid(), signal.SIGTERM))
    assert first.step == 1
    check(tmp_path, [first, live(config)], undisturbed("expert_choice"))


def test_stop_request_in_the_last_step_is_a_finished_run(tiny_shards, tmp_path):
    config = configure(tmp_path, tiny_shards, "train.steps=4")
    assert live(config, stop_after=4).finished


def test_resuming_a_finished_run_changes_nothing(tiny_shards, tmp_path):
    config = configure(tmp_path, tiny_shards, "train.steps=4")
    first, before = live(config), _files(tmp_path)
    again = live(config)
    assert again.finished
    assert_same(first.tensors, again.tensors)
    assert _files(tmp_path) == before


def test_fewer_steps_than_done_are_refused(tiny_shards, tmp_path):
    live(configure(tmp_path, tiny_shards, "train.steps=6"))
    before = _files(tmp_path)
    with pytest.raises(ConfigError, match=r"train.steps = 4: .* is already at step 6; nearest valid: 6"):
        live(configure(tmp_path, tiny_shards, "train.steps=4"))
    assert _files(tmp_path) == before


def test_a_longer_schedule_goes_on(tiny_shards, tmp_path):
    """With a constant rate, 6 steps and then 12 are 12 steps."""
    constant = "optim.schedule=constant"
    whole = live(configure(tmp_path / "whole", tiny_shards, constant))
    live(configure(tmp_path / "parts", tiny_shards, constant, "train.steps=6"))
    parts = live(configure(tmp_path / "parts", tiny_shards, constant))
    assert_same(parts.tensors, whole.tensors)
    assert steady(records(tmp_path / "parts")) == steady(records(tmp_path / "whole"))


def test_means_between_log_steps_survive_a_stop(tiny_shards, tmp_path):
    """A record is a mean over the steps since the last one, whether or not a stop lies between them."""
    every = "observe.log_every=5"
    live(configure(tmp_path / "whole", tiny_shards, every))
    config = configure(tmp_path / "parts", tiny_shards, every)
    for stop in (3, 7, None):
        live(config, stop_after=stop)
    assert [line["step"] for line in records(tmp_path / "parts")] == [5, 10, 12]
    assert steady(records(tmp_path / "parts")) == steady(records(tmp_path / "whole"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_drawing_does_not_touch_training(precision, tiny_shards, tmp_path):
    """Sample grids swap the averaged weights in; what is trained afterwards is as if nobody had looked."""
    how = f"train.precision={precision}"
    blind = live(configure(tmp_path / "blind", tiny_shards, how))
    seeing = live(configure(tmp_path / "seeing", tiny_shards, how, "observe.sample_every=3"))
    assert len(list((tmp_path / "seeing" / "samples").glob("*.png"))) == 4
    assert len(list((tmp_path / "seeing" / "routing").glob("*.npz"))) == 4
    assert_same(blind.tensors, seeing.tensors)


def test_a_damaged_checkpoint_is_passed_over(undisturbed, tiny_shards, tmp_path, capsys):
    config = configure(tmp_path, tiny_shards)
    live(config, stop_after=6)
    path = next((tmp_path / "checkpoints" / "step_00000006").glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    last = live(config)
    assert "checkpoint of step 6 passed over" in capsys.readouterr().out
    assert len(last.seen) == STEPS - 4
    assert_same(last.tensors, undisturbed("expert_choice")[0].tensors)
    assert steady(records(tmp_path)) == steady(undisturbed("expert_choice")[1])


@pytest.mark.slow
def test_wandb_id_is_stable(tiny_shards, tmp_path):
    """Offline: every life leaves a W&B folder of the same run id."""
    config = configure(tmp_path, tiny_shards, "observe/sinks=wandb")
    live(config, stop_after=5)
    name = (tmp_path / "wandb_id").read_text()
    live(config)
    assert (tmp_path / "wandb_id").read_text() == name
    made = sorted(path.name for path in (tmp_path / "wandb").glob("offline-run-*"))
    assert made
    assert all(folder.endswith(name.strip()) for folder in made)


# --- real processes ------------------------------------------------------------------------------------------------

LONG = ("train.steps=120", "checkpoint.every_steps=20", "optim.schedule=constant", "checkpoint.save=background")


@pytest.fixture(scope="module")
def long_run(tiny_shards, tmp_path_factory):
    run = tmp_path_factory.mktemp("long")
    return live(configure(run, tiny_shards, *LONG)), records(run)


def _start(run: Path, shards: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "ecdit_train.cli", "train", *words(run, shards, *LONG)]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True)  # fmt: skip


def _interrupt(process: subprocess.Popen, run: Path, number: int, *, moment: random.Random) -> int:
    """Send the signal at a random moment of the training; returns the exit code."""
    metrics, wanted = run / "metrics.jsonl", moment.randrange(2, 60)
    deadline = time.monotonic() + 120
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < wanted:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(moment.random() * 0.05)
    process.send_signal(number)
    _, error = process.communicate(timeout=120)
    assert "Traceback" not in error
    return process.returncode


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 75), (signal.SIGKILL, -9)],
                         ids=["SIGTERM", "SIGINT", "SIGKILL"])  # fmt: skip
def test_a_process_is_interrupted(number, code, long_run, tiny_shards, tmp_path):
    moment = random.Random(time.time_ns())
    process = _start(tmp_path, tiny_shards)
    try:
        assert _interrupt(process, tmp_path, number, moment=moment) == code
    finally:
        process.kill()
    first = len(records_before_resume(tmp_path))
    life = live(configure(tmp_path, tiny_shards, *LONG))
    assert life.finished
    if code == 75:
        assert len(life.seen) == 120 - first  # not one step twice
    assert steady(records(tmp_path)) == steady(long_run[1])
    assert life.seen == long_run[0].seen[120 - len(life.seen) :]
    assert_same(life.tensors, long_run[0].tensors)


def records_before_resume(run: Path) -> list[dict]:
    """Complete lines; a killed process may leave a cut one."""
    lines = (run / "metrics.jsonl").read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


@pytest.mark.slow
def test_killed_again_and_again(long_run, tiny_shards, tmp_path):
    """Random signals at random moments, real processes only, until one life ends by itself."""
    moment, codes = random.Random(time.time_ns()), []
    while not codes or codes[-1] != 0:
        process = _start(tmp_path, tiny_shards)
        if len(codes) < 6:
            time.sleep(moment.uniform(3.0, 9.0))
            process.send_signal(moment.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGKILL]))
        _, error = process.communicate(timeout=300)
        # -15, -2 and -12: asked before it could listen
        assert process.returncode in (0, 75, -9, -15, -2, -12), error
        codes.append(process.returncode)
    assert steady(records(tmp_path)) == steady(long_run[1])


def _files(folder: Path) -> dict[str, bytes]:
    """But for whose the folder was and is, which every life writes down."""
    kept = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    names = {path: path.relative_to(folder) for path in kept}
    return {str(name): path.read_bytes() for path, name in names.items() if name.parts[0] not in ("lease", "lives")}

"""Real runs with offline W&B: what its files say, one after the other, is `metrics.jsonl`, whatever ended the lives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_runs import configure, cut_power, live, words

from ecdit_train.supervise import alert_file

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "observe"))

from observe_wandb_file import run_files
from observe_wandb_runs import same, shown

WATCHED = ("observe/sinks=wandb", "observe.sample_every=4")


@pytest.fixture(autouse=True)
def _no_wandb_environment(monkeypatch):
    for name in ("WANDB_MODE", "WANDB_DIR", "WANDB_RUN_ID", "WANDB_SERVICE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


def one_run_as_logged(run: Path, *, steps: int) -> None:
    rows = shown(run)
    assert [row["_step"] for row in rows if "samples/grid/_type" in row] == list(range(4, steps + 1, 4))
    assert all(("samples/grid/_type" in row) == ("samples/routing/_type" in row) for row in rows)
    assert all("routing/L2/experts_per_token" in {k.rpartition("/_")[0] or k for k in row} for row in rows)
    beside = ("samples/grid", "samples/routing", "routing/L")
    assert same([{k: v for k, v in row.items() if not k.startswith(beside)} for row in rows], run)
    assert len(rows) == steps
    assert len({path.name for path in run_files(run)}) == 1, "one id"


def test_a_roll_back_a_cut_and_a_stop_are_one_run(tiny_shards, tmp_path):
    """Checkpoints at 4 and 8; the samples of step 7 are bad: back to step 4. Then a cut after step 10, then to the end."""

    def poison(trainer):
        encode = trainer.batches.encode

        def spoiled(raw):
            batch = encode(raw)
            if int(batch.position_B[0]) // trainer.config.train.global_batch == 6:
                batch.latents_BCHW.mul_(float("nan"))
            return batch

        trainer.batches.encode = spoiled

    config = configure(tmp_path, tiny_shards, *WATCHED, "health.non_finite=roll_back")
    assert not live(config, stop_after=2).finished
    assert not live(config, before=lambda trainer: [poison(trainer), cut_power(10)(trainer)]).finished
    assert live(config).finished
    one_run_as_logged(tmp_path, steps=12)
    told = [(line["life"], line["name"], line["step"], line["state"]) for line in alert_file.read(tmp_path)]
    assert told == [(2, "non-finite", 7, "on"), (2, "non-finite", 10, "off")]


LONG = ("train.steps=60", "checkpoint.every_steps=6", "optim.schedule=constant", "checkpoint.save=background")


@pytest.mark.slow
def test_two_processes_killed_requeued_and_resumed_are_one_run(tiny_shards, tmp_path):
    base = [sys.executable, "-m", "ecdit_train.cli", "--nproc", "2"]
    train = [*base, "train", *words(tmp_path, tiny_shards, *WATCHED, *LONG)]
    for number, wanted in ((signal.SIGKILL, 15), (signal.SIGTERM, 30), (signal.SIGKILL, 45)):
        process = subprocess.Popen(train, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)
        try:
            _wait(process, tmp_path / "metrics.jsonl", wanted)
            os.killpg(process.pid, number)
            process.wait(timeout=120)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    done = subprocess.run(train, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300, check=False)
    assert done.returncode == 0
    one_run_as_logged(tmp_path, steps=60)


def _wait(process: subprocess.Popen, metrics: Path, wanted: int) -> None:
    deadline = time.monotonic() + 180
    while not metrics.exists() or max((_step(line) for line in metrics.read_bytes().splitlines()), default=0) < wanted:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _step(line: bytes) -> int:
    try:
        return int(json.loads(line)["step"])
    except ValueError:
        return 0

"""Offline W&B read back is the run's own log, whatever ended its lives: real W&B, its files read without its code."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from observe_wandb_file import history, records, run_files
from observe_wandb_runs import CONFIG, opened, same, shown, sink

from ecdit_train.observe.figures import sample_grid
from ecdit_train.observe.journal import read_records
from ecdit_train.observe.wandb_names import names


@pytest.fixture(autouse=True)
def _no_wandb_environment(monkeypatch):
    for name in ("WANDB_MODE", "WANDB_DIR", "WANDB_RUN_ID", "WANDB_SERVICE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


def test_every_row_of_two_lives_under_one_id_and_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "planted-0123456789")
    config = CONFIG | {"hub_token": "s3cr3t", "cluster": {"env": ["X=planted-0123456789"]}}
    grid = sample_grid(np.zeros((1, 8, 8, 3), np.uint8), ["a"], tmp_path / "samples/step_25.png")
    for life, start in ((1, 1), (2, 26)):
        one = sink(tmp_path, life=life, after=start - 1, config=config)
        for step in range(start, start + 25):
            one.log(step, {"train/loss": 1 / step})
        one.images(grid, "samples/grid", start + 24, "a picture")
        one.committed(start + 24)
        one.close(timeout=60)
    first, second = run_files(tmp_path)
    logged = shown(tmp_path)
    assert [h["train/step"] for h in logged] == [h["_step"] for h in logged] == list(range(1, 51))
    assert [h["train/step"] for h in logged if h.get("samples/grid/_type") == "image-file"] == [25, 50]
    identity = (tmp_path / "wandb_id").read_text().strip()
    for path in (first, second):
        assert path.name == f"run-{identity}.wandb"
        raw = path.read_bytes()
        assert b"planted-0123456789" not in raw
        assert b"s3cr3t" not in raw
        metrics = [r.metric for r in records(path) if r.WhichOneof("record_type") == "metric"]
        assert any(m.glob_name == "*" and m.step_metric == "train/step" for m in metrics)
        assert any(m.name == "train/loss" and m.summary.min for m in metrics)
        run = next(r.run for r in records(path) if r.WhichOneof("record_type") == "run")
        assert (run.display_name, run.run_group, run.job_type) == (
            f"{tmp_path.name}, shapes_tiny, 8e, seed 17",
            "shapes_tiny",
            "train",
        )
        assert set(run.tags) == {"4x128", "ExpertChoice", "ep2", "fp32"}
        assert run.host == "-", "no name of a machine leaves it"
        lives = [json.loads(item.value_json) for item in run.config.update if item.key == "life"]
    assert lives[0]["number"] == 2


def test_a_roll_back_leaves_no_trace(tmp_path):
    sinks = opened(tmp_path)
    for step in range(1, 7):
        sinks.log(step, {"train/loss": 1.0, "bad": float("nan")})
        sinks.committed(step // 3 * 3 - 3)
    sinks.rewind(3)
    for step in range(4, 12):
        sinks.log(step, {"train/loss": 2.0})
    sinks.committed(11)
    sinks.close()
    assert same(shown(tmp_path), tmp_path)
    assert [row["train/loss"] for row in shown(tmp_path)] == [1.0] * 3 + [2.0] * 8


def test_a_checkpoint_that_is_lost_doubles_no_point(tmp_path):
    """What W&B has cannot be taken back: those steps keep their first values, and none is there twice."""
    for life, after, steps in ((1, 0, range(1, 9)), (2, 4, range(5, 13))):
        sinks = opened(tmp_path, life=life, after=after)
        for step in steps:
            sinks.log(step, {"by": life})
        sinks.committed(steps[-1])
        sinks.close()
    assert [(row["_step"], row["by"]) for row in shown(tmp_path)] == [(n, 1 if n < 9 else 2) for n in range(1, 13)]


def test_rows_go_at_once_where_that_is_asked_for(tmp_path):
    for life, after in ((1, 0), (2, 3)):
        one = sink(tmp_path, life=life, after=after, rows="at_once")
        for step in range(after + 1, after + 7):
            one.log(step, {"by": life})
        one.close(timeout=60)
    assert [(row["_step"], row["by"]) for row in shown(tmp_path)] == [(n, 1 if n < 7 else 2) for n in range(1, 10)]


def test_what_a_life_could_not_send_the_next_one_does(tmp_path, monkeypatch):
    """A life without W&B at all, then one with it."""
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "wandb", None)
        sinks = opened(tmp_path)
        for step in range(1, 8):
            sinks.log(step, {"train/loss": 1 / step, "bad": float("nan")})
        sample_grid(np.zeros((1, 8, 8, 3), np.uint8), ["a"], tmp_path / "samples/step_4.png")
        sinks.committed(5)
        sinks.close()
    assert not run_files(tmp_path)
    sinks = opened(tmp_path, life=2, after=5)
    for step in range(6, 9):
        sinks.log(step, {"train/loss": 2.0})
    sinks.committed(8)
    sinks.close()
    rows = shown(tmp_path)
    assert [n for n, row in enumerate(rows, start=1) if "samples/grid/_type" in row] == [4]
    assert same([{k: v for k, v in row.items() if not k.startswith("samples/")} for row in rows], tmp_path)


LIFE = """
import os, sys, time
sys.path.insert(0, {here!r})
from pathlib import Path
from observe_wandb_runs import opened
run, life, after, until, committed = Path(sys.argv[1]), *map(int, sys.argv[2:6])
sinks = opened(run, life=life, after=after)
for step in range(after + 1, until + 1):
    sinks.log(step, {{"train/loss": 1 / step, "life": life}})
sinks.committed(committed)
if "close" in sys.argv:
    sinks.close()
else:
    while not sinks._copies["wandb"]._queue.empty():
        time.sleep(0.02)
    time.sleep(float(sys.argv[6]))
    os.kill(os.getpid(), 9)
"""


def _life(run: Path, *words: object) -> int:
    program = LIFE.format(here=str(Path(__file__).parent))
    return subprocess.run(
        [sys.executable, "-c", program, str(run), *map(str, words)], env={**os.environ}, timeout=120, check=False
    ).returncode


def _many(run: Path, lives: int) -> None:
    after = 0
    for life in range(1, lives + 1):
        committed = after + 3
        if life % 4 == 0 or life == lives:
            assert _life(run, life, after, committed, committed, "close") == 0
        else:
            assert _life(run, life, after, committed + 2, committed, 0.1 * (life % 3)) == -signal.SIGKILL
        after = committed
    assert len({path.name for path in run_files(run)}) == 1, "one id"
    assert [r["step"] for r in read_records(run)] == list(range(1, 3 * lives + 1))
    assert same(shown(run), run)


def test_kills_neither_double_nor_lose_a_point(tmp_path):
    _many(tmp_path, 3)


@pytest.mark.slow
def test_twenty_restarts_are_one_run(tmp_path):
    _many(tmp_path, 20)


def test_a_file_with_a_cut_end_is_read_up_to_there(tmp_path):
    from ecdit_train.observe import wandb_log
    from ecdit_train.observe.wandb_run import newest_row

    one = sink(tmp_path)
    for step in range(1, 200):
        one.log(step, {f"m{n}": float(step) for n in range(60)})
    one.committed(199)
    one.close(timeout=60)
    (path,) = run_files(tmp_path)
    whole = list(wandb_log.records(path))
    assert len(whole) == len(list(records(path)))
    assert len(path.read_bytes()) > 2 * wandb_log.BLOCK, "records lie over blocks"
    assert newest_row(tmp_path) == 199
    path.write_bytes(path.read_bytes()[: -len(path.read_bytes()) // 3])
    os.utime(path, (0, 0))
    rest = list(wandb_log.records(path))
    assert whole[: len(rest)] == rest
    assert newest_row(tmp_path) == max(row["_step"] for row in history_up_to(path, len(rest)))


def history_up_to(path: Path, count: int) -> list[dict]:
    from itertools import islice

    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in islice(records(path), count)
        if record.WhichOneof("record_type") == "history"
    ]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, ("run", "run", ())),
        ({"experiment": "run"}, ("run", "run", ())),
        ({"experiment": "e", "moe": {"router": None}, "train": {"seed": 3}}, ("run, e, seed 3", "e", ("dense",))),
    ],
)
def test_names_say_what_differs(config, expected, tmp_path):
    found = names(tmp_path / "run", config)
    assert (found.name, found.group) == expected[:2]
    assert set(expected[2]) <= set(found.tags)


def test_runs_of_a_sweep_are_one_group(tmp_path):
    (tmp_path / "lr" / "moe=dense,lr=3").mkdir(parents=True)
    (tmp_path / "lr" / "multirun.yaml").touch()
    found = names(tmp_path / "lr" / "moe=dense,lr=3", {"experiment": "e"}, tags=["mine", "x" * 100])
    assert (found.group, found.name) == ("lr", "moe=dense,lr=3")
    assert "mine" in found.tags
    assert max(map(len, found.tags)) == 64


def test_the_reader_of_this_test_reads_what_wandb_wrote(tmp_path):
    """Guards `same`: a value that differs is seen."""
    sinks = opened(tmp_path)
    sinks.log(1, {"a": 1.0})
    sinks.committed(1)
    sinks.close()
    (path,) = run_files(tmp_path)
    (row,) = history(path)
    assert same([row], tmp_path)
    assert not same([row | {"a": 2.0}], tmp_path)
    assert not same([row, row], tmp_path)
    assert not same([], tmp_path)


def test_numbers_of_the_machine_are_sent_and_its_name_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr("ecdit_train.observe.wandb_run.STATS_SECONDS", 1.0)
    one = sink(tmp_path)
    one.log(1, {"train/loss": 1.0})
    one.committed(1)
    time.sleep(5)
    one.close(timeout=60)
    (path,) = run_files(tmp_path)
    seen = {item.key for r in records(path) if r.WhichOneof("record_type") == "stats" for item in r.stats.item}
    assert any("cpu" in key for key in seen), seen
    assert any("memory" in key for key in seen), seen
    name = socket.gethostname()
    raw = path.read_bytes()
    assert name.encode() not in raw
    assert not [r for r in records(path) if r.WhichOneof("record_type") == "environment"]

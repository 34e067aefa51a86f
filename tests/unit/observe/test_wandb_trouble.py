"""W&B in trouble costs a rank nothing between start and end, and five seconds at the end: a W&B of ours that hangs, and the real
one before a server that does."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
import time
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
from observe_wandb_file import run_files
from observe_wandb_runs import opened, same, shown, sink
from observe_wandb_server import KEY, serving, wait_for

from ecdit_train.observe.journal import read_records
from ecdit_train.observe.wandb_run import stable_id

BOUND = 5.0
"""Seconds, at the start and at the end."""
SLACK = 1.0
"""For a machine that does other things besides."""


@pytest.fixture(autouse=True)
def _own_wandb_environment(monkeypatch, tmp_path):
    for name in ("WANDB_MODE", "WANDB_DIR", "WANDB_RUN_ID", "WANDB_SERVICE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


class FakeRun:
    step = starting_step = 0
    url = None

    def __init__(self, log: object, finish: object) -> None:
        self.log, self.finish, self.summary = log, finish, {}

    def define_metric(self, *args: object, **kwargs: object) -> None: ...


def fake_wandb(
    monkeypatch: pytest.MonkeyPatch, *, init: object = None, log: object = None, finish: object = None
) -> None:
    def nothing(*args: object, **kwargs: object) -> None: ...

    run = FakeRun(log or nothing, finish or nothing)
    module = types.SimpleNamespace(
        init=init or (lambda **_: run), Settings=lambda **_: None, teardown=nothing, Image=lambda *a, **k: None
    )
    monkeypatch.setitem(sys.modules, "wandb", module)  # type: ignore[arg-type]


def hang(*args: object, **kwargs: object) -> None:
    threading.Event().wait(20)


def fail(*args: object, **kwargs: object) -> None:
    raise RuntimeError("no route\nto host")


def leave(*args: object, **kwargs: object) -> None:
    raise SystemExit(3)


@pytest.mark.parametrize("where", ["init", "log", "finish"])
@pytest.mark.parametrize("trouble", [hang, fail, leave])
def test_trouble_never_reaches_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: str, trouble: object
) -> None:
    fake_wandb(monkeypatch, **{where: trouble})
    caplog.set_level(logging.WARNING, logger="ecdit.observe")
    one = sink(tmp_path, queue_size=8, rows="at_once")
    start = time.monotonic()
    for step in range(200):
        one.log(step, {"train/loss": 1.0})
    one.images(tmp_path / "no.png", "samples", 1, "")
    assert time.monotonic() - start < 0.5
    one.close(timeout=0.4)
    one.close(timeout=0.4)
    one.log(201, {})
    assert time.monotonic() - start < 2.0
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("W&B")]
    assert 1 <= len(lines) <= 3  # the trouble, a full queue, and an end that was not waited for
    assert all("\n" not in line for line in lines)


def test_slow_is_dropped_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def slow(payload: dict[str, int], *, step: int, commit: bool) -> None:
        time.sleep(0.01)
        seen.append(step)

    fake_wandb(monkeypatch, log=slow)
    one = sink(tmp_path, queue_size=4, rows="at_once")
    for step in range(1, 501):
        one.log(step, {})
    one.close(timeout=5)
    assert 1 <= len(seen) < 500
    assert seen == list(range(1, len(seen) + 1))  # a later life, or ecdit dash sync, goes on from the newest: no hole


def test_a_row_that_fails_holds_back_those_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes after it would bar its way for good."""
    seen: list[int] = []

    def refuses(payload: dict[str, int], *, step: int, commit: bool) -> None:
        if step == 3 and len(tries) < 4:
            tries.append(step)
            raise RuntimeError("not now")
        seen.append(step)

    tries: list[int] = []
    fake_wandb(monkeypatch, log=refuses)
    one = sink(tmp_path)
    for step in range(1, 11):
        one.log(step, {})
        if step % 5 == 0:
            one.committed(step)
    one.close(timeout=5)
    assert tries
    assert seen == list(range(1, 11))


def test_a_picture_that_is_none_costs_its_row_nothing(tmp_path: Path) -> None:
    sinks = opened(tmp_path)
    path = tmp_path / "samples/step_00000003.png"
    path.parent.mkdir()
    path.write_bytes(b"no picture")
    for step in range(1, 11):
        sinks.log(step, {"train/loss": 1 / step})
        if step == 3:
            sinks.image(path, key="samples/grid", step=3, caption="")
    sinks.committed(10)
    sinks.close()
    assert same(shown(tmp_path), tmp_path)
    assert [row["train/step"] for row in shown(tmp_path)] == list(range(1, 11))


LIFE = """
import json, sys, time
sys.path.insert(0, {here!r})
from pathlib import Path
from observe_wandb_runs import opened
began = time.monotonic()
sinks = opened(Path(sys.argv[1]), life=int(sys.argv[2]), after=int(sys.argv[3]), mode="online")
started, slowest = time.monotonic() - began, 0.0
for step in range(int(sys.argv[3]) + 1, int(sys.argv[3]) + 11):
    at = time.monotonic()
    sinks.log(step, {{"train/loss": 1 / step}})
    sinks.committed(step)
    slowest = max(slowest, time.monotonic() - at)
time.sleep(float(sys.argv[4]))
at = time.monotonic()
sinks.close()
print(json.dumps([started, slowest, time.monotonic() - at]), flush=True)
"""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Seconds."""

    start: float
    slowest: float
    """Of the calls between."""
    end: float
    exit: float
    """From the end of `close` to the end of the process."""
    said: str


def _life(run: Path, *, life: int = 1, after: int = 0, pause: float) -> Cost:
    """A life of ten steps in a process of its own, as W&B's client cannot start anew in one where it hangs."""
    program = LIFE.format(here=str(Path(__file__).parent))
    with subprocess.Popen(
        [sys.executable, "-c", program, str(run), str(life), str(after), str(pause)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        numbers = process.stdout.readline()
        at = time.monotonic()
        said = process.stderr.read()
        assert process.wait(timeout=60) == 0, said
    start, slowest, end = json.loads(numbers)
    return Cost(start=start, slowest=slowest, end=end, exit=time.monotonic() - at, said=said)


@pytest.mark.parametrize(
    "trouble", ["refuse", "hang", *(pytest.param(t, marks=pytest.mark.slow) for t in ("500", "429", "drip"))]
)
def test_a_server_in_trouble_costs_no_more_than_the_bound(trouble, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with serving(trouble) as server:
        monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9" if trouble == "refuse" else server.url)
        cost = _life(tmp_path, pause=1.0)
    print(f"{trouble}: {cost}")
    assert cost.start < SLACK
    assert cost.slowest < 0.5
    assert cost.end < BOUND
    assert cost.exit < BOUND, "tenths of a second where nothing else runs: docs/how-to/watch-with-wandb.md"
    assert [r["step"] for r in read_records(tmp_path)] == list(range(1, 11))


@pytest.mark.slow
def test_a_server_that_dies_in_the_middle_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with serving() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        identity = stable_id(tmp_path)
        _life(tmp_path, pause=0.5)
        assert len(server.runs[identity].history) == 10
        server.trouble = "500"
        _life(tmp_path, life=2, after=10, pause=0.5)
        server.trouble = ""
        _life(tmp_path, life=3, after=20, pause=0.5)
        assert same(server.runs[identity].history, tmp_path)
        assert len(server.runs) == 1
        assert server.runs[identity].asked["jobType"] == "train"
    assert len(read_records(tmp_path)) == 30


def test_online_without_a_key_is_offline_and_says_so_once(tmp_path):
    said = _life(tmp_path, pause=0.0).said
    assert said.count("no key") == 1
    assert f"ecdit dash sync {tmp_path}" in said
    assert same(shown(tmp_path), tmp_path)


def test_a_server_that_refuses_the_run_leaves_the_offline_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("ecdit_train.observe.wandb_run.START_SECONDS", 2.0)
    sinks = opened(tmp_path, mode="online")
    sinks.log(1, {"train/loss": 1.0})
    sinks.committed(1)
    assert wait_for(lambda: run_files(tmp_path), seconds=30)
    monkeypatch.setenv("WANDB_BASE_URL", "https://w.invalid")
    sinks._copies["wandb"].close(timeout=20)  # type: ignore[attr-defined]
    assert same(shown(tmp_path), tmp_path)

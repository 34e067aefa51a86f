"""Alerts begin once, end once, do not flutter, and each has a page that says what to do."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from pathlib import Path

import pytest

from ecdit_train.config.compose import compose
from ecdit_train.config.validate import validate
from ecdit_train.errors import ConfigError, RunOwnedError, StorageError
from ecdit_train.observe.alerts import CALM, KINDS, PATIENCE, USUAL, Watch
from ecdit_train.observe.sinks import SinkContext, open_sinks
from ecdit_train.supervise import alert_file

LIMITS = compose(["experiment=shapes_tiny"], local=False).observe.alerts
DOCS = Path(__file__).parents[3] / "docs"

QUIET = {"data/stall_frac": 0.02, "data/substituted": 0.0, "perf/step_s": 1.0, "moe/L2/entropy": 0.6, "ckpt/failed": 0}
TROUBLE = {
    "slow-data": {"data/stall_frac": 0.5},
    "bad-samples": {"data/substituted": 3.0},
    "save-refused": {"ckpt/failed": 1},
    "dead-experts": {"moe/L2/entropy": 0.001},
    "slow-steps": {"perf/step_s": 2.0},
}


def test_what_an_earlier_life_left_on_is_over_with_it(tmp_path: Path) -> None:
    alert_file.append(tmp_path, life=1, step=3, name="slow-data", state="on", words="x")
    assert [one["name"] for one in alert_file.open_ones(tmp_path, life=1)] == ["slow-data"]
    assert alert_file.open_ones(tmp_path, life=2) == []


def test_a_torn_or_foreign_line_swallows_nothing(tmp_path: Path) -> None:
    (tmp_path / "alerts.jsonl").write_text('{"life": "three", "name": "x", "state": "on"}\n{"life": 1, "na')
    alert_file.append(tmp_path, life=1, step=3, name="slow-data", state="on", words="x")
    assert [one["name"] for one in alert_file.open_ones(tmp_path)] == ["slow-data"]


def told(watch, records, *, first=1):
    return [
        (alert.name, alert.step, alert.over)
        for step, record in enumerate(records, start=first)
        for alert in watch.see(step, QUIET | record)
    ]


def test_every_alert_has_a_page_that_names_it_and_is_listed():
    index = (DOCS / "README.md").read_text()
    for name, kind in KINDS.items():
        page = DOCS / "runbook" / kind.page
        assert f"Alert `{name}`" in page.read_text(), page
        assert f"runbook/{kind.page}" in index, page
    named = {path.name for path in (DOCS / "runbook").glob("*.md") if "\nAlert `" in path.read_text()}
    assert named == {kind.page for kind in KINDS.values()}


@pytest.mark.parametrize("name", TROUBLE)
def test_it_begins_once_and_is_over_once(name):
    watch = Watch(LIMITS)
    assert told(watch, [{}] * USUAL) == []
    patience = 1 if name in ("bad-samples", "save-refused") else PATIENCE
    began = told(watch, [TROUBLE[name]] * 10, first=100)
    assert began == [(name, 99 + patience, False)]
    assert told(watch, [{}] * 20, first=200) == [(name, 199 + CALM, True)]


@pytest.mark.parametrize("name", TROUBLE)
def test_a_value_at_the_limit_does_not_flood(name):
    watch = Watch(LIMITS)
    told(watch, [{}] * USUAL)
    records = [TROUBLE[name] if n % 2 else {} for n in range(200)]
    assert len(told(watch, records, first=100)) <= 1


def test_values_that_are_missing_or_no_numbers_are_no_alert():
    watch = Watch(LIMITS)
    for step in range(1, 60):
        record = dict.fromkeys([key for t in TROUBLE.values() for key in t], [None, math.nan, math.inf][step % 3])
        assert watch.see(step, record) == []
        assert watch.see(step, {}) == []


def test_a_new_usual_is_learnt_only_from_steps_that_are_usual():
    watch = Watch(LIMITS)
    told(watch, [{}] * USUAL)
    assert told(watch, [{"perf/step_s": 1.4}] * 100, first=100) == []
    assert told(watch, [{"perf/step_s": 1.9}] * 10, first=300) == []  # 1.4 is usual now
    assert told(watch, [{"perf/step_s": 2.2}] * 10, first=400) == [("slow-steps", 402, False)]


def test_experts_that_are_counted_dead_are_named():
    watch = Watch(LIMITS)
    (alert,) = [a for step in range(1, 4) for a in watch.see(step, {"moe/L4/dead_experts": 2.0, "moe/L4/entropy": 0.5})]
    assert "L4 has 2 experts" in str(alert)
    assert "docs/runbook/dead-experts.md" in str(alert)


def test_events_and_the_disk_and_restarts():
    watch = Watch(LIMITS)
    assert [a.level for a in watch.event("non-finite", 5, "loss nan")] == ["error"]
    assert watch.event("non-finite", 6, "loss nan") == []
    assert told(watch, [{}] * 10, first=7) == [("non-finite", 6 + CALM, True)]
    assert [a.name for a in watch.see(20, {}, free_saves=1.5)] == ["disk-nearly-full"]
    assert [a.over for step in range(21, 30) for a in watch.see(step, {}, free_saves=9.0)] == [True]
    now = 10_000.0
    assert watch.begins([now - 4000, now - 100, now - 50, now], now=now, step=1) == []
    assert [a.name for a in watch.begins([now - 60 * n for n in range(5)], now=now, step=1)] == ["many-restarts"]


LIMIT_OF = {
    "slow-data": ("stall_frac",),
    "bad-samples": ("bad_samples",),
    "dead-experts": ("router_entropy", "dead_experts"),
    "slow-steps": ("slow_steps",),
}


@pytest.mark.parametrize("name", LIMIT_OF)
def test_null_switches_one_alert_off_and_no_other(name):
    watch = Watch(replace(LIMITS, **dict.fromkeys(LIMIT_OF[name])))
    told(watch, [{}] * USUAL)
    assert told(watch, [TROUBLE[name] | {"moe/L2/dead_experts": 9.0}] * 10, first=100)[1:] == []
    assert {
        what for what, *_ in told(watch, [dict(x for t in TROUBLE.values() for x in t.items())] * 10, first=200)
    } == (TROUBLE.keys() - {name}) - ({"dead-experts"} if name != "dead-experts" else set())  # that one began above


def test_limits_are_the_runs_own():
    """Above its own limit, and at its ordinary one, which no longer counts."""
    watch = Watch(replace(LIMITS, stall_frac=0.6, dead_experts=3, bad_samples=4, slow_steps=3.0))
    told(watch, [{}] * USUAL)
    usual = {"data/stall_frac": 0.5, "moe/L2/dead_experts": 2.0, "data/substituted": 3.0, "perf/step_s": 2.9}
    assert told(watch, [usual] * 10, first=100) == []
    more = {"data/stall_frac": 0.6, "moe/L2/dead_experts": 3.0, "data/substituted": 4.0, "perf/step_s": 9.0}
    began = told(watch, [more] * 10, first=200)
    assert {name for name, *_ in began} == {"slow-data", "dead-experts", "bad-samples", "slow-steps"}
    none = Watch(replace(LIMITS, restarts=None, free_checkpoints=None))
    assert none.begins([9.0] * 50, now=10.0, step=1) == []
    assert none.see(1, {}, free_saves=0.1) == []
    early = Watch(replace(LIMITS, restarts=2, free_checkpoints=10.0))
    assert [a.name for a in early.begins([9.0] * 2, now=10.0, step=1)] == ["many-restarts"]
    assert [a.name for a in early.see(1, {}, free_saves=9.0)] == ["disk-nearly-full"]


def test_a_limit_that_could_never_speak_or_never_be_silent_is_refused():
    wrong = {"stall_frac": 1.5, "slow_steps": 1.0, "dead_experts": 0, "router_entropy": 0.6}
    wrong |= {"bad_samples": 0, "free_checkpoints": 0.0, "restarts": 1}
    assert set(wrong) == {field.name for field in fields(LIMITS)}
    config = compose(["experiment=shapes_tiny", *(f"observe.alerts.{k}={v}" for k, v in wrong.items())], local=False)
    with pytest.raises(ConfigError) as error:
        validate(config, world=1)
    assert all(f"observe.alerts.{name} = " in str(error.value) for name in wrong)


class Heard:
    def __init__(self) -> None:
        self.alerts: list[str] = []

    def log(self, step, record): ...

    def close(self): ...

    def alert(self, alert):
        self.alerts.append(str(alert))


class Opens:
    def __init__(self, sink) -> None:
        self.sink = sink

    def open(self, run):
        return self.sink


def test_an_alert_is_said_sent_and_kept(tmp_path):
    heard, said = Heard(), []
    about = SinkContext(folder=tmp_path, config={}, name="n", resume_step=0)
    for life in (1, 2):
        sinks = open_sinks(about, {"mine": Opens(heard)}, rank=0, limits=LIMITS, life=life, say=said.append)
        sinks.log(1, {"data/substituted": 2.0})
        sinks.event("loss-spike", 2, "loss 9 is far above")
        sinks.close()
    assert len(said) == len(heard.alerts) == 4
    lines = alert_file.read(tmp_path)
    assert [(line["life"], line["name"], line["state"]) for line in lines] == [
        (life, name, "on") for life in (1, 2) for name in ("bad-samples", "loss-spike")
    ]
    assert [line["name"] for line in alert_file.open_ones(tmp_path)] == ["bad-samples", "loss-spike"]
    assert all(json.loads(line) for line in (tmp_path / "alerts.jsonl").read_text().splitlines())


def test_what_is_on_is_the_newest_lifes_and_what_its_job_said_after(tmp_path):
    def line(name, state, life):
        alert_file.append(tmp_path, name=name, state=state, life=life, step=1, level="error", words="")

    line("no-progress", "on", None)
    line("slow-data", "on", 1)
    assert [one["name"] for one in alert_file.open_ones(tmp_path)] == ["slow-data"]
    line("slow-data", "off", 1)
    line("no-progress", "on", None)
    assert [one["name"] for one in alert_file.open_ones(tmp_path)] == ["no-progress"]
    with (tmp_path / "alerts.jsonl").open("a") as file:
        file.write('{"name": "cut')
    assert [one["name"] for one in alert_file.open_ones(tmp_path)] == ["no-progress"]


def test_ranks_other_than_0_tell_nobody(tmp_path):
    about = SinkContext(folder=tmp_path, config={}, name="n", resume_step=0)
    sinks = open_sinks(about, {}, rank=1, limits=LIMITS)
    sinks.log(1, {"data/substituted": 2.0})
    sinks.event("non-finite", 1, "")
    sinks.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [RunOwnedError("another's"), StorageError("moved")])
def test_a_folder_that_is_another_s_gets_no_line(tmp_path, error):
    def not_ours() -> None:
        raise error

    about, said = SinkContext(folder=tmp_path, config={}, name="n", resume_step=0), []
    sinks = open_sinks(about, {}, rank=0, limits=LIMITS, still_ours=not_ours, say=said.append)
    sinks.event("non-finite", 1, "nan")
    assert said
    assert alert_file.read(tmp_path) == []


def test_a_disk_that_refuses_ends_nothing(tmp_path):
    alert_file.append(tmp_path / "gone", name="x")
    assert alert_file.read(tmp_path / "gone") == []

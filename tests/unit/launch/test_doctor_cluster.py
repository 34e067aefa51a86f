"""What `ecdit doctor` says of Slurm, with clusters that are not fit."""

from __future__ import annotations

import json

import pytest
from slurm_stand_in import StandIn, partition

from ecdit_train.config.convert import with_values
from ecdit_train.doctor import cluster

CONFIG = """Configuration data as of 2026-01-01T00:00:00
AuthInfo                = socket=/run/munge,cred_expire=5
ClusterName             = big
JobRequeue              = 1
KillWait                = 30 sec
PreemptMode             = REQUEUE
RequeueExit             = (null)
SlurmdTimeout           = 300 sec
SLURM_VERSION           = 22.05.8
"""


@pytest.fixture
def asked(demo, tmp_path, monkeypatch):
    """`asked(words, config)`: what is found, by name; several under one name in a list."""

    def ask(values=None, *, config: str = CONFIG, partitions: str | None = None, run=None, bare: bool = False):
        made = {} if partitions is None else {"partitions": partitions}
        StandIn(folder=tmp_path / "bin", config=config, **made).install(monkeypatch)
        chosen = None if bare else with_values(demo, values or {}).cluster
        found: dict[str, list] = {}
        for one in cluster.slurm(chosen, run=run):
            found.setdefault(one.what, []).append(one)
        return found

    return ask


def test_a_cluster_that_is_fit(asked):
    found = asked()
    assert {one.state for ones in found.values() for one in ones} == {"ok"}
    assert found["slurm"][0].found == "22.05.8, cluster big"
    assert found["come back"][0].found.startswith("a requeued job starts after 5 s")
    assert "cpu (default): 2 nodes" in asked(bare=True)["partitions"][0].found


def test_no_slurm_here(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    (one,) = cluster.slurm(None, run=None)
    assert (one.state, one.found.startswith("not on this machine")) == ("ok", True)


def test_a_controller_that_does_not_answer(tmp_path, monkeypatch):
    StandIn(folder=tmp_path / "bin").install(monkeypatch)
    (tmp_path / "bin" / "scontrol").write_text("#!/bin/sh\necho 'Unable to contact slurm controller' >&2; exit 1\n")
    (one,) = cluster.slurm(None, run=None)
    assert (one.state, "Unable to contact" in one.found) == ("warning", True)


def test_what_launch_would_refuse(asked):
    found = asked({"cluster.partition": "gpx", "cluster.time_limit": "01:00:00"})
    (one,) = found["partitions"]
    assert (one.state, one.fix) == ("fail", "cluster.partition=gpu")
    limit = asked({"cluster.time_limit": "02:00:00"}, partitions=partition("cpu", Default="YES", MaxTime="01:00:00"))
    assert limit["partitions"][0].fix == "cluster.time_limit=01:00:00"


@pytest.mark.parametrize(
    ("line", "what", "state", "said"),
    [
        ("SLURM_VERSION           = 19.05.1", "slurm", "fail", "19.05.1"),
        ("RequeueExit             = 75,99", "requeue", "warning", "would be brought back"),
        ("JobRequeue              = 0", "requeue", "ok", "our scripts ask for it"),
        ("PreemptMode             = CANCEL", "preemption", "warning", "ends a preempted job for good"),
        ("PreemptMode             = GANG,SUSPEND", "preemption", "warning", "stops a preempted job's processes"),
        ("SlurmdTimeout           = 0 sec", "lost node", "warning", "never calls"),
        ("SlurmdTimeout           = 3600 sec", "lost node", "warning", "after 3600 s"),
        ("AuthInfo                = (null)", "come back", "ok", "after 120 s"),
    ],
)
def test_settings(line, what, state, said, asked):
    kept = [known for known in CONFIG.splitlines() if known.split()[0] != line.split()[0]]
    ones = asked(config="\n".join([*kept, line, ""]))[what]
    assert any(one.state == state and said in one.found for one in ones), ones


def test_a_partition_has_its_own_preemption(asked):
    (one,) = asked(partitions=partition("cpu", Default="YES", PreemptMode="CANCEL"))["preemption"]
    assert (one.state, "in cpu is CANCEL" in one.found) == ("warning", True)


def test_the_lead_against_what_a_save_has_taken(asked, tmp_path):
    (tmp_path / "run" / "metrics").mkdir(parents=True)
    lines = [{"step": 1, "perf/step_s": 2.0}, {"step": 2, "perf/step_s": 3.0, "ckpt/save_s": 50.0}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "run" / "metrics" / "0001.jsonl").write_text(text)
    found = asked({"cluster.signal_lead": 60}, run=tmp_path / "run")
    (one,) = found["signal lead"]
    assert (one.state, one.fix) == ("warning", "cluster.signal_lead=90")
    assert "may take 83 s" in one.found
    assert found["kill wait"][0].state == "warning"
    assert asked({"cluster.signal_lead": 90}, run=tmp_path / "run")["signal lead"][0].state == "ok"

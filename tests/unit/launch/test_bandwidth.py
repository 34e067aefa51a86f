"""The all-reduce bandwidth before a life: whom it names. Slurm and the ranks are played; one real measurement is at the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from job_stage import Stage, write

from launch import bandwidth, job_file
from launch.decide import Ending
from launch.slurm import Slurm

MEASURES = """#!{python} -S
import os
known = {known}
print("ecdit-bandwidth", known[os.environ["SLURM_STEP_NUM_NODES"] + os.environ["MASTER_ADDR"]])
"""


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """`measured(known)`: the check of three nodes that are asked for 10 bytes/s; `known`: nodes and first host -> what is found."""

    def check(known: dict[str, float], *, wanted: float = 10.0):
        stage = Stage(folder=tmp_path, nodes=("n1", "n2", "n3"))
        monkeypatch.setenv("PATH", stage.environ["PATH"])
        stage.python.write_text(MEASURES.format(python=sys.executable, known=known))
        checks = json.loads(stage.job().read_text())["preflight"] | {"bandwidth": wanted}
        job = job_file.read(stage.job(preflight=checks))
        slurm = Slurm(outside=stage.clock, job="12", environ=stage.environ)
        ending = bandwidth.check(job, hosts=stage.nodes, slurm=slurm, environ=stage.environ)
        return ending, stage.calls("srun")

    return check


def test_enough_is_one_measurement(measured):
    ending, calls = measured({"3n1": 12.0})
    assert (ending.code, len(calls)) == (0, 1)


def test_nothing_is_measured_where_nothing_is_asked_for(measured):
    ending, calls = measured({}, wanted=0.0)
    assert (ending.code, calls) == (0, [])


def test_the_node_that_both_neighbours_find_slow_is_named(measured):
    """The stand-in knows a pair by its first host, which n1 is in both of its pairs."""
    ending, calls = measured({"3n1": 1.0, "2n1": 1.0, "2n2": 12.0})
    assert len(calls) == 4
    assert [host for host, _ in ending.bad] == ["n1"]
    assert "cluster.preflight_bandwidth" in ending.why


def test_where_all_pairs_are_slow_no_node_is_blamed(measured):
    ending, _ = measured({"3n1": 1.0, "2n1": 1.0, "2n2": 1.0})
    assert (ending.code, ending.bad) == (1, ())


SAYS_MUCH = """#!/bin/sh
[ "$SLURM_NODEID" = 0 ] && head -c 300000 /dev/zero | tr '\\0' x && echo && echo ecdit-bandwidth 12.0
"""
NEVER_ENDS = """#!/bin/sh
trap "" TERM
for n in $(seq 150); do sleep 0.1; done
"""
TOGETHER = """#!{python} -S
import os, time
calls, pair = {calls!r}, os.environ["SLURM_STEP_NUM_NODES"] == "2"
ends = time.monotonic() + 20
while pair and open(calls).read().count("--nodes=2") < 2 and time.monotonic() < ends: time.sleep(0.01)
print("ecdit-bandwidth", 12.0 if pair and time.monotonic() < ends else 1.0)
"""


def check(stage: Stage, body: str, monkeypatch: pytest.MonkeyPatch) -> Ending:
    monkeypatch.setenv("PATH", stage.environ["PATH"])
    write(stage.python, body)
    checks = json.loads(stage.job().read_text())["preflight"] | {"bandwidth": 10.0}
    slurm = Slurm(outside=stage.clock, job="12", environ=stage.environ)
    job = job_file.read(stage.job(preflight=checks))
    return bandwidth.check(job, hosts=stage.nodes, slurm=slurm, environ=stage.environ)


def test_ranks_that_say_much_do_not_wait_for_a_reader(tmp_path, monkeypatch):
    """NCCL_DEBUG=INFO is more than a pipe holds."""
    assert check(Stage(folder=tmp_path), SAYS_MUCH, monkeypatch).code == 0


def test_a_step_that_does_not_end_is_killed(tmp_path, monkeypatch):
    stage = Stage(folder=tmp_path)
    stand_in = (stage.bin / "srun").read_text()
    write(
        stage.bin / "srun", stand_in.replace("signal.signal(signal.SIGTERM, kill)", "signal.signal(signal.SIGTERM, 1)")
    )
    monkeypatch.setattr(bandwidth, "SECONDS", 10.0)
    ending = check(stage, NEVER_ENDS, monkeypatch)
    assert (ending.code, ending.bad) == (1, ())
    assert "does not end" in ending.why
    assert 40.0 <= stage.clock.time < 60.0


def test_pairs_that_share_no_node_are_measured_at_once(tmp_path, monkeypatch):
    """Each pair waits for the other one to begin."""
    stage = Stage(folder=tmp_path, nodes=("n1", "n2", "n3", "n4"))
    ending = check(stage, TOGETHER.format(python=sys.executable, calls=str(stage.bin / "calls")), monkeypatch)
    assert "the all-reduce moves 0.00 GB/s" in ending.why
    assert ending.bad == ()
    lists = [word for call in stage.calls("srun") for word in call.split() if word.startswith("--nodelist")]
    assert sorted(lists[1:3]) == ["--nodelist=n1,n2", "--nodelist=n3,n4"]
    assert sorted(lists[3:]) == ["--nodelist=n1,n4", "--nodelist=n2,n3"]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 9])
def test_every_neighbour_is_met_once_and_no_node_twice_in_a_round(size):
    hosts = [f"n{n}" for n in range(size)]
    rounds = bandwidth._rounds(hosts)
    for pairs in rounds:
        assert len({host for pair in pairs for host in pair}) == 2 * len(pairs)
    met = sorted(pair for pairs in rounds for pair in pairs)
    ring = [(hosts[n], hosts[n + 1]) for n in range(size - 1)] + [(hosts[0], hosts[-1])]
    assert met == (sorted(ring) if size > 2 else [])


def test_a_measurement_of_two_real_ranks():
    command = [sys.executable, "-m", "launch.bandwidth", "2", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env={**os.environ})
    assert float(done.stdout.partition(bandwidth.MARK)[2]) > 1e6

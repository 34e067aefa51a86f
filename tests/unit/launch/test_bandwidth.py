"""The all-reduce bandwidth before a life: whom it names. Slurm and the ranks are played; one real measurement is at the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from job_stage import Stage

from launch import bandwidth, job_file
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


def test_a_measurement_of_two_real_ranks():
    command = [sys.executable, "-m", "launch.bandwidth", "2", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env={**os.environ})
    assert float(done.stdout.partition(bandwidth.MARK)[2]) > 1e6

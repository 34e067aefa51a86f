"""What is wrong with a node: what its own task finds, and what the supervisor makes of all their answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from job_stage import Clock, Stage, write

from ecdit_train.errors import StorageError
from launch import job_file, preflight, preflight_task, slurm
from launch.decide import Ending
from launch.preflight import check, judge

FINE = {"missing": [], "gpus": 8, "free": 10**12, "sees": True, "seen": True, "late": 0.1}


@pytest.fixture
def job(tmp_path):
    checks = {"gpus": 8, "free_bytes": 10**9, "clock_seconds": 5.0, "bandwidth": 0.0, "folders": [str(tmp_path)]}
    return job_file.read(Stage(folder=tmp_path).job(gpu=True, preflight=checks))


def test_fit_nodes(job):
    assert judge(job, {"n1": FINE, "n2": FINE}).code == 0


@pytest.mark.parametrize(
    ("fact", "said"),
    [
        ({"gpus": 7}, "7 GPUs instead of 8"),
        ({"gpu_trouble": "GPU 3 has 2 uncorrected memory errors"}, "GPU 3 has 2 uncorrected"),
        ({"missing": ["/data"]}, "/data: not there, or no access"),
        ({"free": 10**8}, "0.1 GB free, 1.0 GB needed"),
        ({"late": -7.0}, "its clock differs by -7.0 s"),
        ({"sees": False}, "is not seen there"),
        ({"seen": False}, "is not seen from here"),
    ],
)
def test_one_bad_node_is_named(fact, said, job):
    found = judge(job, {"n1": FINE, "n2": FINE | fact})
    assert [host for host, _ in found.bad] == ["n2"]
    assert said in found.why
    assert found.why.startswith("n2: ")


def test_of_three_clocks_the_lonely_one_is_wrong(job):
    """The supervisor's own may be it."""
    found = judge(job, {"n1": FINE, "n2": FINE | {"late": 60.0}, "n3": FINE | {"late": 61.0}})
    assert [host for host, _ in found.bad] == ["n1"]


def test_storage_that_fails_everywhere_is_no_nodes_fault(job):
    found = judge(job, {"n1": FINE | {"free": 5}, "n2": FINE | {"missing": ["/data"]}})
    assert (found.code, found.bad) == (StorageError.exit_code, ())


def test_gpus_are_not_counted_where_none_are_wanted(tmp_path):
    job = job_file.read(Stage(folder=tmp_path).job())
    assert judge(job, {"n1": FINE | {"gpus": 0}}).code == 0


def smi(folder: Path, body: str) -> dict[str, str]:
    write(folder / "nvidia-smi", f"#!/bin/sh\n{body}\n")
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


def test_nvidia_smi_is_asked(tmp_path):
    rows = "echo '0, 0'; echo '1, 4'; echo '2, [N/A]'"
    assert preflight_task.gpus(smi(tmp_path, rows)) == {
        "gpus": 3,
        "gpu_trouble": "GPU 1 has 4 uncorrected memory errors",
    }
    assert preflight_task.gpus(smi(tmp_path, "echo '0, 0'")) == {"gpus": 1}
    sick = preflight_task.gpus(smi(tmp_path, "echo Unable to determine the device handle; exit 15"))
    assert sick == {"gpus": 0, "gpu_trouble": "nvidia-smi: Unable to determine the device handle"}


def test_the_task_tells_its_facts(tmp_path):
    (tmp_path / "supervisor").write_text("t")
    asked = {
        "gpu": False,
        "folders": [str(tmp_path), "/none"],
        "run": str(tmp_path),
        "meeting": str(tmp_path),
        "token": "t",
    }
    env = {**os.environ, "SLURMD_NODENAME": "n5"}
    command = [sys.executable, "-m", "launch.preflight_task", json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    facts = json.loads(done.stdout.partition(preflight_task.MARK)[2])
    assert (facts["host"], facts["missing"], facts["sees"]) == ("n5", ["/none"], True)
    assert facts["free"] > 0
    assert (tmp_path / "n5").read_text() == "t"


def test_a_name_that_never_comes_is_not_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight_task, "FOLDER_SECONDS", 0.1)
    assert not preflight_task.meets(tmp_path, token="t", host="n5")


class Slow:
    """Two nodes, of which n2 answers its checks only when `go` is there; time runs once n1 has answered."""

    def __init__(self, folder: Path, *, srun: tuple[str, ...] = (), until: float = float("inf")) -> None:
        self.stage, self.go, self.until = Stage(folder=folder), folder / "go", until
        waits = f'[ "$SLURMD_NODENAME" = n2 ] && while [ ! -e "{self.go}" ]; do sleep 0.02; done'
        python = write(folder / "slow", f'#!/bin/sh\n{waits}\nexec {sys.executable} "$@"\n')
        self.job = job_file.read(self.stage.job(python=str(python), srun=list(srun)))
        self.stage.clock.at_each = self.pass_time

    def pass_time(self) -> None:
        if self.stage.clock.time > self.until:
            self.go.touch()
        elif list(self.stage.run.glob("jobs/12/*/*/n1")):
            self.stage.clock.time += 6.0

    def check(self, *known: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Ending, set[str]]:
        monkeypatch.setenv("PATH", self.stage.environ["PATH"])
        of = slurm.Slurm(outside=self.stage.clock, job="12", environ=self.stage.environ)
        answered = set(known)
        folder = self.stage.run / "jobs" / "12" / "life-0001"
        found = check(self.job, hosts=["n1", "n2"], slurm=of, environ=of.environ, folder=folder, known=answered)
        return found, answered


@pytest.mark.parametrize(("srun", "until"), [((), 400.0), (("--container-image=/i.sqsh",), 1000.0)])
def test_a_slow_first_step_is_no_fault(srun, until, tmp_path, monkeypatch):
    """A prolog before the first step, or an image that the other node has already."""
    stage = Slow(tmp_path, srun=srun, until=until)
    found, answered = stage.check(monkeypatch=monkeypatch)
    assert (found.code, found.bad, found.lost) == (0, (), ())
    assert answered == {"n1", "n2"}
    assert len(stage.stage.calls("srun")) == 1


def test_a_node_that_has_answered_before_gets_less_time(tmp_path, monkeypatch):
    stage = Slow(tmp_path)
    found, _ = stage.check("n1", "n2", monkeypatch=monkeypatch)
    assert [host for host, _ in found.bad] == ["n2"]
    assert stage.stage.clock.time < 600


@pytest.mark.parametrize("known", [(), ("n1", "n2")])
def test_the_first_program_of_a_node_may_take_longer(known, tmp_path, monkeypatch):
    """srun itself has failed: each node is asked for one."""
    stage = Slow(tmp_path)
    probes = []
    monkeypatch.setattr(slurm.Slurm, "silent", lambda _, hosts, seconds: probes.append((hosts, seconds)) or ["n2"])
    stage.stage.play("dead", "n1")
    stage.check(*known, monkeypatch=monkeypatch)
    assert probes == [(["n1", "n2"], 30.0 if known else 180.0)]


def test_a_second_round_meets_elsewhere(tmp_path, monkeypatch):
    """A node may remember a folder of the same name that was removed (NFS)."""
    stage, asked = Slow(tmp_path), []
    real = Clock.start

    def start(clock, command, **rest):
        asked.append(json.loads(command[-1])["meeting"])
        return real(clock, command, **rest)

    monkeypatch.setattr(Clock, "start", start)
    monkeypatch.setattr(slurm.Slurm, "silent", lambda *_, **__: [])
    stage.stage.play("dead", "n1")
    stage.check(monkeypatch=monkeypatch)
    assert len(set(asked)) == 2
    assert preflight_task.FOLDER_SECONDS > 60  # acdirmax
    assert preflight_task.FOLDER_SECONDS + preflight_task.GPU_SECONDS < preflight.OTHERS_SECONDS

"""One command as a job, on the node: what is started, its exit code, and when it goes back into the queue."""

from __future__ import annotations

import sys

import pytest
from job_stage import Stage, write

from ecdit_train.errors import ConfigError, EcditError
from launch import task

VERB = """#!{python} -S
import os, signal, sys, time
def warned(*_):
    print("warned", flush=True)
    sys.exit(75)
if "study" in sys.argv: signal.signal(signal.SIGUSR2, warned)
open({run!r} + "/started", "a").write(" ".join(sys.argv[1:]) + "\\n")
time.sleep({seconds})
sys.exit({code})
"""


@pytest.fixture
def stage(tmp_path, monkeypatch) -> Stage:
    made = Stage(folder=tmp_path, nodes=("n1",))
    monkeypatch.setenv("PATH", made.environ["PATH"])
    return made


def run(stage: Stage, *words: str, code: int = 0, seconds: float = 0, **changed: object) -> int:
    text = VERB.format(python=sys.executable, run=str(stage.run), code=code, seconds=seconds)
    python = write(stage.bin / "verb", text)
    path = stage.job(python=str(python), words=list(words), **changed)
    return task.run(path, environ=stage.environ, outside=stage.clock)


def started(stage: Stage) -> list[str]:
    return (stage.run / "started").read_text().splitlines()


@pytest.mark.parametrize("code", [0, 1, 62, 79])
def test_the_exit_code_is_the_commands(stage, code, capsys):
    """So that `afterok` means what it says."""
    assert run(stage, "evaluate", "run=a b", code=code) == code
    assert started(stage) == ["-m ecdit_train.cli evaluate run=a b"]
    assert f"job 12: exit code {code}" in capsys.readouterr().err
    assert stage.calls("scontrol") == []


def test_a_task_of_an_array_knows_its_part(stage):
    stage.environ["SLURM_ARRAY_TASK_ID"] = "3"
    run(stage, "data", "index", "set", "--part", f"{task.TASK}/4", srun=["--cpus-per-task=2"])
    assert started(stage) == ["-m ecdit_train.cli data index set --part 3/4"]
    (call,) = stage.calls("srun")
    assert "--nodes=1 --ntasks=1 --export=ALL --cpus-per-task=2" in call


def test_stopped_and_saved_goes_back_into_the_queue(stage):
    assert run(stage, "study", "routing", code=75) == 75
    assert stage.calls("scontrol") == ["scontrol requeue 12"]


def test_the_last_task_of_an_array_speaks_for_itself_alone(stage):
    """Its number is the array's: to scontrol that means all tasks, and squeue answers with all."""
    stage.environ |= {"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "7"}
    stage.play("state", "10|PENDING|JobArrayTaskLimit|\n12|RUNNING|None|")
    assert run(stage, "study", "routing", code=75) == 75
    assert stage.calls("scontrol") == ["scontrol requeue 12_7"]


def test_not_for_ever(stage, capsys):
    stage.environ["SLURM_RESTART_COUNT"] = "99"
    assert run(stage, "study", "routing", code=75) == 76
    assert stage.calls("scontrol") == []
    assert "stopped 100 times (cluster.lives)" in capsys.readouterr().err


def test_a_cancelled_one_stays_cancelled(stage):
    stage.play("state", "CANCELLED|None|(null)")
    assert run(stage, "study", "routing", code=75) == 75
    assert stage.calls("scontrol") == []


def test_only_who_listens_is_warned(stage, capfd):
    """USR2 would end any other verb, with time left."""
    stage.clock.warned.append("USR2")
    assert run(stage, "evaluate", "run=r", seconds=0.3) == 0
    assert run(stage, "study", "routing", seconds=20) == 75
    assert "warned" in capfd.readouterr().out


def test_outside_of_a_job(stage, tmp_path):
    stage.environ.pop("SLURM_JOB_ID")
    with pytest.raises(EcditError, match="run: sbatch"):
        run(stage, "evaluate", "run=r")
    with pytest.raises(ConfigError, match="cannot be read"):
        task.run(tmp_path / "none.json", environ=stage.environ, outside=stage.clock)

"""What RUN/job.sh does, in a real bash: it passes warnings on from its first line on, and returns what the supervisor returns."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from importlib import resources
from pathlib import Path
from string import Template

import pytest
from job_stage import Stage, write


def script(
    *,
    setup: str = "",
    run: str = "/runs/x",
    job_python: str = "python",
    code: str = "''",
    cwd: str = "/tmp",
    pause: float = 0.2,
) -> str:
    """As `ecdit launch` fills it."""
    template = (resources.files("launch") / "job.sh.template").read_text(encoding="utf-8")
    return Template(template).substitute(
        comment="# of a test",
        module="launch.job",
        directives="#SBATCH --nodes=1",
        setup=setup,
        run=f"'{run}'",
        lead=60,
        job_python=f"'{job_python}'",
        code=code,
        cwd=f"'{cwd}'",
        tries=3,
        pause=pause,
        code_requeue=75,
        code_storage=87,
    )


def test_bash_and_shellcheck_can_read_it(tmp_path):
    path = write(tmp_path / "job.sh", script(setup="export A=1\n"))
    subprocess.run(["bash", "-n", str(path)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "--exclude=SC2064", "-s", "bash", str(path)], check=True)


def start(folder: Path, *, supervisor: str, setup: str = "", code: str = "''") -> subprocess.Popen:
    """The script, with a supervisor that is this much bash."""
    (folder / "bin").mkdir(exist_ok=True)
    python = write(folder / "bin" / "my python", f"#!/usr/bin/env bash\n{supervisor}\n")
    (folder / "job.json").touch()
    text = script(setup=setup, job_python=str(python), run=str(folder), code=code, cwd=str(folder))
    path = write(folder / "job.sh", text)
    env = {**os.environ}
    return subprocess.Popen(["bash", str(path)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_supervisor_decides_the_exit_code(tmp_path):
    for code in (0, 75, 77):
        process = start(tmp_path, supervisor=f'echo "$@"; exit {code}')
        out, _ = process.communicate(timeout=30)
        assert process.returncode == code
        assert out.split() == ["-m", "launch.job", f"{tmp_path}/job.json"]


def test_warnings_while_modules_are_loaded_are_not_lost(tmp_path):
    setup = f"touch {tmp_path}/loads; sleep 1\n"
    process = start(tmp_path, setup=setup, supervisor="read -r a; read -r b; echo $a $b; exit 75")
    wait_for(tmp_path / "loads")
    process.send_signal(signal.SIGUSR2)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 75
    assert sorted(out.split()) == ["TERM", "USR2"]


def test_warnings_while_the_supervisor_starts_and_works_are_not_lost(tmp_path):
    """It may even get the signal itself before it listens: Slurm's SIGTERM goes to every process of the step."""
    body = f"touch {tmp_path}/is; sleep 0.5; read -r a; read -r b; echo $a $b; exit 75"
    process = start(tmp_path, supervisor=body)
    wait_for(tmp_path / "is")
    process.send_signal(signal.SIGUSR2)
    time.sleep(0.2)
    process.send_signal(signal.SIGUSR2)
    out, _ = process.communicate(timeout=30)
    assert (process.returncode, out.split()) == (75, ["USR2", "USR2"])


def test_a_flood_of_warnings_does_not_change_the_exit_code(tmp_path):
    """Also where it goes on while the supervisor ends: bash itself forgets the status of a child then, now and then."""
    for attempt in range(40):
        process = start(tmp_path, supervisor=f"touch {tmp_path}/is-{attempt}; exit 3")
        while process.poll() is None:
            if (tmp_path / f"is-{attempt}").exists():
                process.send_signal(signal.SIGTERM)
            time.sleep(0.0005)
        process.communicate(timeout=30)
        assert process.returncode == 3, attempt


def test_a_killed_supervisor_is_said(tmp_path):
    process = start(tmp_path, supervisor="kill -9 $$")
    _, err = process.communicate(timeout=30)
    assert process.returncode == 137
    assert f"sbatch {tmp_path}/job.sh" in err


def test_the_snapshot_is_imported_first_and_the_working_directory_never(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/mine")
    for code, path in (("'/runs/x/code/1'", "/runs/x/code/1:/mine"), ("''", "/mine")):
        out, _ = start(tmp_path, supervisor='echo "$PYTHONSAFEPATH $PYTHONPATH"', code=code).communicate(timeout=30)
        assert out.strip() == f"1 {path}"


def test_a_module_that_cannot_be_loaded_ends_the_job(tmp_path):
    process = start(tmp_path, setup="false\n", supervisor="exit 0")
    process.communicate(timeout=30)
    assert process.returncode == 1


@pytest.mark.parametrize("when", ["at once", "in a life"])
def test_script_supervisor_and_ranks_together(when, tmp_path):
    """The real supervisor, under the real script: a warning becomes a save and a requeue."""
    stage = Stage(folder=tmp_path, nodes=("n1",))
    (stage.run / "ranks").write_text('[{"all": "wait commit=4 end=75"}]')
    stage.job(code=None)
    real = __import__("sys").executable
    path = write(stage.run / "job.sh", script(run=str(stage.run), job_python=real, cwd=str(tmp_path)))
    env = {**os.environ, **stage.environ, "PYTHONPATH": f"{Path(__file__).parents[3]}"}
    process = subprocess.Popen(["bash", str(path)], env=env, stderr=subprocess.PIPE, text=True)
    if when == "in a life":
        wait_for(stage.run / "jobs" / "12" / "life-0001" / "node-0000.json")
    else:
        time.sleep(0.1)
    process.send_signal(signal.SIGUSR2)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "back into the queue" in err
    assert len(stage.lines("life")) == (when == "in a life")
    assert stage.calls("scontrol requeue")


def lacking(folder: Path, *, pause: float = 0.2, answer: int = 0, **environ: str) -> tuple[subprocess.Popen, Path]:
    """The script on a node that lacks something, with a scontrol that answers so, and what that was asked."""
    (folder / "bin").mkdir(exist_ok=True)
    asked = folder / "asked"
    write(folder / "bin" / "scontrol", f'#!/bin/sh\necho "$*" >> "{asked}"\nexit {answer}\n')
    env = {"PATH": f"{folder}/bin:/usr/bin:/bin", "SLURM_JOB_ID": "12"} | environ
    path = write(
        folder / "job.sh", script(run=str(folder), cwd=str(folder / "mount"), pause=pause, job_python="/none/py")
    )
    process = subprocess.Popen(
        ["bash", str(path)], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    return process, asked


@pytest.mark.parametrize(
    ("there", "said"), [((), "working directory"), (("mount",), "job.json"), (("mount", "job.json"), "/none/py")]
)
def test_a_node_that_lacks_something_gives_the_job_back(there, said, tmp_path):
    for name in there:
        (tmp_path / name).mkdir()
    process, asked = lacking(tmp_path, SLURMD_NODENAME="n7")
    _, err = process.communicate(timeout=30)
    assert (process.returncode, asked.read_text()) == (75, "requeue 12\n")
    assert "ecdit: on n7: " in err
    assert said in err


def test_a_task_of_an_array_gives_itself_back_alone(tmp_path):
    process, asked = lacking(tmp_path, SLURM_ARRAY_JOB_ID="12", SLURM_ARRAY_TASK_ID="0")
    process.communicate(timeout=30)
    assert asked.read_text() == "requeue 12_0\n"


@pytest.mark.parametrize(("answer", "restarts"), [(0, "3"), (1, "0")])
def test_what_does_not_come_back_says_how_to_go_on(answer, restarts, tmp_path):
    """Too often, or Slurm refuses."""
    process, asked = lacking(tmp_path, answer=answer, SLURM_RESTART_COUNT=restarts)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 87
    assert f"sbatch {tmp_path}/job.sh" in err
    assert asked.exists() == (restarts == "0")


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 87), ("SIGUSR2", 75)])
def test_a_warning_ends_the_pause_and_scancel_is_left_alone(name, code, tmp_path):
    process, asked = lacking(tmp_path, pause=60)
    time.sleep(1.0)
    process.send_signal(getattr(signal, name))
    process.communicate(timeout=30)
    assert (process.returncode, asked.exists()) == (code, code == 75)

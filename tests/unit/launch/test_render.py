"""Job scripts: what is in them, that bash can read them, and what they do with exit codes (Slurm played by stubs)."""

from __future__ import annotations

import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

from ecdit_train.config.compose import compose
from ecdit_train.config.convert import with_values
from ecdit_train.errors import ConfigError
from ecdit_train.supervise.exit_file import leave_exit_code
from launch.render import job_name, render

CLUSTERS = ("local", "h100_ib400", "h200_ib400", "slurm_pyxis")


@cache
def config(cluster: str = "h100_ib400"):
    return compose(["experiment=ec_dit_xl_8e", f"cluster={cluster}"], local=False)


def directives(script: str) -> list[str]:
    return re.findall(r"^#SBATCH --(.+)$", script, flags=re.MULTILINE)


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_bash_can_read_it(cluster, tmp_path):
    path = tmp_path / "job.sh"
    path.write_text(render(config(cluster), run_folder="/runs/with space/x", overrides=["a=it's"], python="/opt/p y"))
    subprocess.run(["bash", "-n", str(path)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "-s", "bash", str(path)], check=True)


def test_directives():
    assert directives(render(config(), run_folder="/runs/x")) == [
        "job-name=ec_dit_xl_8e",
        "nodes=1",
        "ntasks-per-node=1",
        "gpus-per-node=8",
        "cpus-per-task=96",
        "time=1-00:00:00",
        "output=/runs/x/logs/%x-%j.out",
        "open-mode=append",
        "signal=B:USR2@600",
        "requeue",
    ]


def test_optional_directives_only_when_set():
    lines = directives(render(config("slurm_pyxis"), run_folder="/runs/x"))
    assert {"partition=gpu", "account=research", "qos=normal"} <= set(lines)
    assert not any("gpus" in line for line in directives(render(config("local"), run_folder="/runs/x")))


def test_directives_come_before_commands():
    script = render(config("slurm_pyxis"), run_folder="/runs/x")
    assert script.startswith("#!/usr/bin/env bash\n")
    first_command = next(i for i, line in enumerate(script.splitlines()) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in script.splitlines()[first_command:])


def test_container_modules_and_environment():
    script = render(with_values(config("slurm_pyxis"), {"data.shards": "/lustre/a b"}), run_folder="/runs/x")
    assert "--container-image='registry.example.org#ecdit/train:0.1.0'" in script
    assert """--container-mounts="$PWD:$PWD","$run:$run",'/lustre/a b:/lustre/a b'""" in script
    assert "set +u  # module scripts read unset variables\nmodule load slurm\nmodule load enroot\nset -u\n" in script
    assert "export NCCL_IB_HCA=mlx5\n" in script
    assert "container" not in render(config(), run_folder="/runs/x")


def test_values_are_quoted():
    script = render(with_values(config(), {"cluster.env": ("A=x $(reboot)",)}), run_folder="/runs/a b%")
    assert "export A='x $(reboot)'\n" in script
    assert "run='/runs/a b%'\n" in script
    assert 'output="/runs/a b%%/logs/%x-%j.out"' in directives(script)


def test_relative_run_folder_becomes_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert f"run={tmp_path}/runs/x\n" in render(config(), run_folder="runs/x")


def test_impossible_folder_is_refused():
    with pytest.raises(ConfigError, match="must not contain a newline"):
        render(config(), run_folder="/runs/a\nb")


def test_job_name_has_no_slash():
    assert job_name(with_values(config(), {"experiment": "a/b c"})) == "a-b-c"


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "HF_TOKEN", "MY_SECRET", "DB_PASSWORD"])
def test_secrets_are_refused_and_not_printed(name):
    with pytest.raises(ConfigError, match="looks like a secret") as caught:
        render(with_values(config(), {"cluster.env": ("OK=1", f"{name}=planted")}), run_folder="/runs/x")
    assert "planted" not in str(caught.value)


def test_the_first_process_that_fails_leaves_its_code(tmp_path):
    target = tmp_path / "exit"
    leave_exit_code(0, environ={"ECDIT_EXIT_FILE": str(target)})
    assert not target.exists()
    leave_exit_code(80, environ={"ECDIT_EXIT_FILE": str(target)})
    leave_exit_code(75, environ={"ECDIT_EXIT_FILE": str(target)})  # terminated because of the first: too late
    assert target.read_text() == "80\n"
    leave_exit_code(75, environ={})
    leave_exit_code(75, environ={"ECDIT_EXIT_FILE": str(Path("/nonexistent/exit"))})

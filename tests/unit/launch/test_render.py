"""Job scripts: what is in them, and that bash can read them."""

from __future__ import annotations

import re
import shutil
import subprocess
from functools import cache

import pytest

from ecdit_train.config.compose import compose
from ecdit_train.config.convert import with_values
from ecdit_train.errors import ConfigError
from launch import render as render_module
from launch.render import job_name, log_path
from launch.render import render as render_for

CLUSTERS = ("local", "h100_ib400", "h200_ib400", "slurm_pyxis")


@cache
def config(cluster: str = "h100_ib400"):
    return compose(["experiment=ec_dit_xl_8e", f"cluster={cluster}"], local=False)


def render(cfg, *, run="/runs/x", code="/runs/x/code/1", job_python="python", cwd="/home/me") -> str:
    return render_for(cfg, run=run, code=code, job_python=job_python, cwd=cwd)


def directives(script: str) -> list[str]:
    return re.findall(r"^#SBATCH --(.+)$", script, flags=re.MULTILINE)


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_bash_can_read_it(cluster, tmp_path):
    path = tmp_path / "job.sh"
    path.write_text(
        render(config(cluster), run="/runs/with space/it's", code="/runs/c d", job_python="/opt/p y", cwd="/h/it's")
    )
    subprocess.run(["bash", "-n", str(path)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "--exclude=SC2064", "-s", "bash", str(path)], check=True)


def test_directives():
    assert directives(render(config())) == [
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
    lines = directives(render(config("slurm_pyxis")))
    assert {"partition=gpu", "account=research", "qos=normal"} <= set(lines)
    assert not any("gpus" in line for line in directives(render(config("local"))))


def test_directives_come_before_commands():
    script = render(config("slurm_pyxis"))
    assert script.startswith("#!/usr/bin/env bash\n")
    first_command = next(i for i, line in enumerate(script.splitlines()) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in script.splitlines()[first_command:])


def test_every_further_directive():
    values = {
        "cluster.mem": "400G", "cluster.exclusive": True, "cluster.exclude": "n[1-3]", "cluster.constraint": "hbm80&ib",
        "cluster.reservation": "friday", "cluster.dependency": "afterok:12", "cluster.array": "0-4%1",
        "cluster.mail_user": "me@example.org", "cluster.mail_type": "FAIL,REQUEUE",
        "cluster.sbatch": ("licenses=data", "contiguous"),
    }  # fmt: skip
    lines = directives(render(with_values(config("slurm_pyxis"), values)))
    assert lines[5:16] == [
        *("time=12:00:00", "partition=gpu", "account=research", "qos=normal", "mem=400G", "exclude=n[1-3]"),
        *("constraint=hbm80&ib", "reservation=friday", "dependency=afterok:12", "exclusive", "array=0-4%1"),
    ]
    assert {"mail-user=me@example.org", "mail-type=FAIL,REQUEUE"} < set(lines)
    assert lines[-3:] == ["requeue", "licenses=data", "contiguous"]


def test_gpus_by_type_are_asked_for_once():
    lines = directives(render(with_values(config(), {"cluster.sbatch": ("gres=gpu:h100:8",)})))
    assert [line for line in lines if "gpu" in line] == ["gres=gpu:h100:8"]


def test_modules_and_environment():
    script = render(config("slurm_pyxis"))
    assert "set +u  # module scripts read unset variables\n" in script
    assert "\nmodule load slurm\nmodule load enroot\nset -u\n" in script
    assert "module load" not in render(config())
    assert "export NCCL_IB_HCA=mlx5\n" in script


@pytest.mark.parametrize("known", [True, False])
def test_modules_where_the_shell_has_not_inherited_them(known, tmp_path, monkeypatch):
    init = tmp_path / "modules.sh"
    init.write_text("module() { echo from the file: $*; }")
    monkeypatch.setattr(render_module, "MODULES", f"/none/modules.sh {init}")
    script = "\n".join(["set -euo pipefail", *(["module() { echo inherited: $*; }"] if known else [])])
    script += "\n".join(render_module._setup(config("slurm_pyxis").cluster))
    out = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[0] == f"{'inherited' if known else 'from the file'}: load slurm"


def test_code_and_interpreter():
    script = render(config(), code="/runs/x/code/ab", job_python="/opt/p y")
    assert "/runs/x/code/ab" in script
    assert "'/opt/p y' -m launch.job" in script
    assert "/code/" not in render(config(), code=None)


def test_values_are_quoted():
    script = render(with_values(config(), {"cluster.env": ("A=x $(reboot)",)}), run="/runs/a b%")
    assert "export A='x $(reboot)'\n" in script
    assert "run='/runs/a b%'\n" in script
    assert 'output="/runs/a b%%/logs/%x-%j.out"' in directives(script)


def test_the_job_works_where_it_was_launched_wherever_it_is_submitted_from():
    assert "\ncd '/home/me/my lab' || later " in render(config(), cwd="/home/me/my lab")
    assert "SLURM_SUBMIT_DIR" not in render(config())


def test_impossible_folder_is_refused():
    with pytest.raises(ConfigError, match="must not contain a newline"):
        render(config(), run="/runs/a\nb")


def test_job_name_has_no_slash():
    assert job_name(with_values(config(), {"experiment": "a/b c"})) == "a-b-c"


def test_where_the_log_lies():
    cfg = config()
    assert log_path(cfg, run="/runs/x", job=12) == "/runs/x/logs/ec_dit_xl_8e-12.out"
    assert log_path(with_values(cfg, {"cluster.array": "0-4%1"}), run="/r", job=12) == "/r/logs/ec_dit_xl_8e-*.out"

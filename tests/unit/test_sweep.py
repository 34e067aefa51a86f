"""`-m`: jobs, their folders, what is checked before the first one starts, and the table they leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ecdit_train import cli, sweep
from ecdit_train.config.resolve import declarations_only
from ecdit_train.errors import ConfigError
from launch import local, submit

WORDS = ["-m", "experiment=shapes_tiny", "moe=dense,token_choice,expert_choice", "train.seed=1,2"]


def ecdit(*argv: object) -> int:
    with pytest.raises(SystemExit) as left:
        cli.main([str(a) for a in argv])
    return left.value.code


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Started(list):
    """Command lines of jobs, in the order of starting."""

    codes: dict[int, int]
    """Number of a start, from 1 -> its exit code; 0 for the others."""


@pytest.fixture
def started(here, monkeypatch) -> Started:
    """Jobs only write a log: the loss is 1, 2, 3, ... in the order of starting."""
    seen = Started()
    seen.codes = {}

    def run_command(argv):
        seen.append(list(argv))
        run = Path(argv[-1].removeprefix("run=").strip("'"))
        run.mkdir(parents=True, exist_ok=True)
        (run / "resolved.yaml").write_text("{}")
        (run / "metrics.jsonl").write_text(json.dumps({"step": 4, "train/loss": float(len(seen))}) + "\n")
        return local.Ended(code=seen.codes.get(len(seen), 0), stopped=False)

    monkeypatch.setattr(local, "run_command", run_command)
    return seen


def test_six_jobs_and_a_table(started, here, capfd):
    assert ecdit("train", *WORDS, "hydra.sweep.dir=sweep") == 0
    assert len(started) == 6
    assert started[1] == [
        "train",
        "experiment=shapes_tiny",
        "moe=dense",
        "train.seed=2",
        "run='sweep/moe-dense+train.seed-2'",
    ]
    found = json.loads((here / "sweep" / "sweep.json").read_text())
    assert [job["run"] for job in found["jobs"]][:2] == ["moe-dense+train.seed-1", "moe-dense+train.seed-2"]
    assert [(line["combination"], line["seeds"], line["mean"]) for line in found["table"]] == [
        ("moe=dense", 2, 1.5), ("moe=token_choice", 2, 3.5), ("moe=expert_choice", 2, 5.5)]  # fmt: skip
    table = capfd.readouterr().out.partition("combination")[2].splitlines()
    assert table[1].split() == ["moe=dense", "2", "4", "1.50000", "0.70711"]
    assert ecdit("compare", "sweep") == 0
    assert capfd.readouterr().out.partition("combination")[2].splitlines()[:4] == table[:4]
    assert sorted(p.name for p in here.iterdir()) == ["sweep"]  # no outputs/, no multirun/


def test_a_crash_does_not_lose_the_others(started, here, capfd):
    started.codes.update({2: 80, 4: 75})
    assert ecdit("train", *WORDS, "hydra.sweep.dir=s") == 80
    said = capfd.readouterr()
    assert len(started) == 6
    assert "exit code 80: moe=dense train.seed=2, s/moe-dense+train.seed-2" in said.out
    assert "1 failed, 1 not finished" in said.out
    again = len(started)
    started.codes.clear()
    assert ecdit("train", *WORDS, "hydra.sweep.dir=s") == 0  # goes on: only what had not finished
    assert [argv[-1] for argv in started[again:]] == [
        "run='s/moe-dense+train.seed-2'",
        "run='s/moe-token_choice+train.seed-2'",
    ]


def test_a_request_to_stop_ends_the_sweep(here, monkeypatch):
    count = []
    monkeypatch.setattr(local, "run_command", lambda argv: count.append(1) or local.Ended(code=75, stopped=True))
    assert ecdit("train", *WORDS, "hydra.sweep.dir=s") == 75
    assert len(count) == 1


def test_what_every_job_is_told(started, here):
    (here / "mine").mkdir()
    assert ecdit("--nproc", 2, "train", "-m", "experiment=shapes_tiny", "train.seed=1,2", "--config-dir", "mine",
                 "--stop-after", 3, "parallel=pair") == 0  # fmt: skip
    assert started[0][:6] == ["--nproc", "2", "train", "--config-dir", "mine", "--stop-after"]
    (folder,) = (here / "runs" / "sweeps").iterdir()
    assert folder.name.startswith("shapes_tiny-2")


def test_nothing_starts_when_one_job_is_wrong(started, here, capsys):
    words = ["experiment=shapes_tiny", "moe=dense,expertchoice", "train.microbatch=8,9", "train.sed=1", "run=x"]
    assert ecdit("train", "-m", *words) == 77
    lines = capsys.readouterr().err.splitlines()
    assert {line.split(" = ")[0].split(": ")[-1] for line in lines} >= {"train.sed", "moe", "train.microbatch"}
    assert len(lines) == len(set(lines))
    assert not started
    assert not list(here.iterdir())


def test_a_run_folder_for_all_jobs_is_refused(started, here, capsys):
    assert ecdit("train", *WORDS, "run=x") == 77
    assert "is the run folder of two jobs" in (line := capsys.readouterr().err)
    assert "nearest valid: hydra.sweep.dir=x" in line
    assert not list(here.iterdir())
    assert ecdit("train", *WORDS, "run=x/${train.seed}-${moe.num_experts}-${moe.scope}", "moe.num_experts=8") == 77
    assert (
        ecdit("train", "-m", "experiment=shapes_tiny", "train.seed=1,2", "run=x/seed${train.seed}", "hydra.sweep.dir=s")
        == 0
    )
    assert [argv[-1] for argv in started] == ["run='x/seed1'", "run='x/seed2'"]


def test_slurm(here, monkeypatch, capsys):
    """Prepared and submitted as by `ecdit launch`, and not twice."""
    submitted = []
    monkeypatch.setenv("PATH", f"{here / 'bin'}:{os.environ['PATH']}")
    for name, body in (("sbatch", ""), ("scontrol", "exit 1")):
        (here / "bin").mkdir(exist_ok=True)
        (here / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
        (here / "bin" / name).chmod(0o755)
    (here / "data" / "shapes").mkdir(parents=True)
    (here / "data" / "shapes" / "manifest.json").write_text("{}")
    monkeypatch.setattr(submit, "submit", lambda script, **_: submitted.append(script) or 100 + len(submitted))
    words = [
        "-m",
        "experiment=shapes_tiny",
        "train.seed=1,2",
        "cluster.nodes=1",
        "cluster.gpus_per_node=2",
        "hydra.sweep.dir=s",
    ]
    assert ecdit("launch", *words) == 0
    assert "2 jobs submitted; when they have run: ecdit compare s" in capsys.readouterr().out
    assert submitted == [Path("s/train.seed-1/job.sh").absolute(), Path("s/train.seed-2/job.sh").absolute()]
    assert "launch.job" in submitted[0].read_text()
    assert (submitted[0].parent / "job.json").exists()
    assert "seed: 2" in (here / "s" / "train.seed-2" / "resolved.yaml").read_text()
    assert ecdit("train", *words, "hydra/launcher=slurm") == 0
    assert len(submitted) == 2
    assert "job 101 submitted before" in capsys.readouterr().out


def test_looking_verbs_look_at_each(here, capsys):
    assert ecdit("config", "show", "-m", "moe=dense,token_choice", "model=tiny") == 0
    shown = capsys.readouterr().out
    assert shown.count("# moe=") == 2
    assert "token_choice.TokenChoice" in shown
    words = ["-m", "experiment=shapes_tiny", "cluster.time_limit='01:00:00','02:00:00'", "--render-only"]
    assert ecdit("launch", *words) == 0
    assert capsys.readouterr().out.count("#!/usr/bin/env bash") == 2
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    "argv", [["train", "-m", "--cfg", "job"], ["train", "--resolve"], ["plan", "--cfg", "job", "--info"]]
)
def test_options_that_exclude_each_other(argv):
    assert ecdit(*argv) == 2


def test_not_under_torchrun(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    assert ecdit("train", "-m", "train.seed=1,2") == 2


def test_folder_names():
    assert sweep.folder_name(["moe=dense", "train.seed=1"]) == "moe-dense+train.seed-1"
    names = {sweep.folder_name([f"run={text}"]) for text in ("a/b", "a b", "a:b", "x" * 300, "x" * 301)}
    assert len(names) == 5
    assert all(len(name) < 120 and "/" not in name and " " not in name for name in names)


def test_the_parent_needs_no_torch(here):
    code = (
        "import sys; from launch import local; from ecdit_train.cli import main\n"
        "local.run_command = lambda argv: local.Ended(code=0, stopped=False)\n"
        "try: main(['train', '-m', 'experiment=shapes_tiny', 'train.seed=1,2'])\n"
        "except SystemExit as e: assert not e.code\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_another_apps_task_is_refused():
    from hydra_plugins.ecdit_launchers import LocalLauncher

    with pytest.raises(TypeError, match="launches jobs of `ecdit VERB -m` only"):
        LocalLauncher().setup(hydra_context=None, task_function=print, config=None)


def test_an_unfinished_check_leaves_nothing(here):
    with declarations_only(), pytest.raises(ConfigError):
        sweep.Sweep(["train.seed=1,x"], launcher="local", config_dir=None)
    assert not list(here.iterdir())

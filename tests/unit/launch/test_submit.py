"""Run folders on the login node, and sbatch's answers."""

from __future__ import annotations

import os

import pytest

from ecdit_train.config.compose import compose
from ecdit_train.config.convert import with_values
from ecdit_train.config.stored import freeze, load
from ecdit_train.errors import ConfigError, RunFolderError
from launch.submit import SubmitError, prepare, submit


@pytest.fixture(scope="module")
def demo():
    return compose(["experiment=shapes_tiny", "cluster=h100_ib400", "cluster.nodes=1", "cluster.gpus_per_node=2"])


def fake_sbatch(folder, body: str) -> None:
    path = folder / "sbatch"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def test_prepare_fills_the_run_folder(demo, tmp_path):
    cfg = with_values(demo, {"run": str(tmp_path / "runs" / "demo")})
    script = prepare(cfg)
    assert script == tmp_path / "runs" / "demo" / "job.sh"
    assert sorted(os.listdir(script.parent)) == ["job.sh", "logs", "resolved.yaml"]
    assert load(script.parent) == cfg
    assert os.access(script, os.X_OK)
    assert f"run={script.parent}\n" in script.read_text()


def test_preparing_twice_is_fine_with_the_same_configuration(demo, tmp_path):
    cfg = with_values(demo, {"run": str(tmp_path / "demo")})
    assert prepare(cfg).read_text() == prepare(cfg).read_text()


def test_launching_again_after_a_life_that_stored_another_path(demo, tmp_path, monkeypatch):
    """A rank is started with the absolute folder, and stores that."""
    monkeypatch.chdir(tmp_path)
    cfg = with_values(demo, {"run": "runs/demo"})
    before = prepare(cfg).read_text()
    freeze(with_values(cfg, {"run": str(tmp_path / "runs" / "demo")}), "runs/demo")
    assert prepare(cfg).read_text() == before


def test_preparing_again_may_change_what_a_resume_may(demo, tmp_path):
    cfg = with_values(demo, {"run": str(tmp_path / "demo")})
    prepare(cfg)
    wider = with_values(cfg, {"cluster.nodes": 2, "data.threads": 3, "train.microbatch": 32})
    assert "#SBATCH --nodes=2\n" in prepare(wider).read_text()
    assert load(tmp_path / "demo") == wider
    longer = with_values(wider, {"train.steps": wider.train.steps + 1})
    with pytest.raises(RunFolderError, match=r"give train\.steps=\d+ on the command line if you mean it"):
        prepare(longer, allow={"optim.lr"})
    assert load(tmp_path / "demo") == wider
    prepare(longer, allow={"train.steps"})
    assert load(tmp_path / "demo") == longer


def test_preparing_another_run_in_the_folder_is_refused(demo, tmp_path):
    cfg = with_values(demo, {"run": str(tmp_path / "demo")})
    before = prepare(cfg).read_text()
    with pytest.raises(RunFolderError) as caught:
        prepare(with_values(cfg, {"train.seed": 1, "data.threads": 3}), allow={"train.seed"})
    assert "train.seed: 0 -> 1 (identity): another run; start a new run folder for it" in str(caught.value)
    assert load(tmp_path / "demo") == cfg
    assert (tmp_path / "demo" / "job.sh").read_text() == before


def test_prepare_checks_the_layout_before_it_writes(demo, tmp_path):
    cfg = with_values(demo, {"run": str(tmp_path / "demo"), "parallel.tp": 2, "cluster.gpus_per_node": 3})
    with pytest.raises(ConfigError, match="must divide the world of 3 ranks"):
        prepare(cfg)
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize("answer", ["4711", "4711;cluster"])
def test_submit_returns_the_job_id(tmp_path, monkeypatch, answer):
    fake_sbatch(tmp_path, f'[ "$1" = --parsable ] && echo "{answer}"')
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert submit(tmp_path / "job.sh") == 4711


def test_submit_says_what_sbatch_said(tmp_path, monkeypatch):
    fake_sbatch(tmp_path, "echo 'Invalid account' >&2; exit 2")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(SubmitError, match=r"sbatch refused job\.sh \(exit code 2\): Invalid account"):
        submit("job.sh")


def test_submit_without_slurm_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SubmitError, match=r"sbatch was not found: runs/x/job\.sh is ready"):
        submit("runs/x/job.sh")
    assert SubmitError.exit_code == 83

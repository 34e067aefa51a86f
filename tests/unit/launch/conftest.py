"""A cluster that answers from files, and a run to submit to it."""

from __future__ import annotations

import pytest
from job_stage import Stage
from slurm_stand_in import StandIn, shards_in

from ecdit_train.config.compose import compose
from ecdit_train.config.convert import with_values


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> StandIn:
    return StandIn(folder=tmp_path / "bin").install(monkeypatch)


@pytest.fixture
def stage(tmp_path, monkeypatch) -> Stage:
    """Slurm and ranks played by stand-ins."""
    made = Stage(folder=tmp_path)
    monkeypatch.setenv("PATH", made.environ["PATH"])
    return made


@pytest.fixture(scope="session")
def _demo():
    words = ["experiment=shapes_tiny", "cluster=local", "cluster.gpus_per_node=2", "cluster.cpus_per_gpu=1"]
    return compose(words, local=False)


@pytest.fixture
def demo(_demo, tmp_path):
    """A run on one CPU node of the stand-in, with a data set that is there."""
    return with_values(
        _demo, {"run": str(tmp_path / "runs" / "demo"), "data.shards": str(shards_in(tmp_path / "shards"))}
    )

"""One cluster for all drills of a session, calm before each; skipped with the reason where there can be none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster
from drills import Run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How long the runs were away: what drills gave to `record_property` in seconds."""
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            if isinstance(value, float):
                terminalreporter.write_line(f"{value:7.1f} s  {name}")


@pytest.fixture(scope="session")
def possible() -> None:
    if reason := Cluster.not_possible():
        pytest.skip(f"no Slurm cluster here: {reason}")


@pytest.fixture(scope="session")
def patient(possible: None) -> Iterator[Cluster]:
    """Four nodes; a node that does not answer is called down after Slurm's default of 300 seconds."""
    with Cluster(slurmd_timeout=300) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def hasty(possible: None) -> Iterator[Cluster]:
    """Four nodes; a node that does not answer is called down after three seconds."""
    with Cluster(slurmd_timeout=3) as cluster:
        yield cluster


@pytest.fixture
def cluster(patient: Cluster) -> Iterator[Cluster]:
    yield patient
    patient.reset()


@pytest.fixture
def quick_cluster(hasty: Cluster) -> Iterator[Cluster]:
    yield hasty
    hasty.reset()


@pytest.fixture
def run(cluster: Cluster, tiny_shards: Path, tmp_path: Path) -> Run:
    """Not launched yet."""
    return Run(cluster, folder=tmp_path / "run", shards=tiny_shards)


@pytest.fixture
def quick_run(quick_cluster: Cluster, tiny_shards: Path, tmp_path: Path) -> Run:
    return Run(quick_cluster, folder=tmp_path / "run", shards=tiny_shards)


@pytest.fixture(scope="session")
def calm(patient: Cluster, tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run that nothing happened to."""
    run = Run(patient, folder=tmp_path_factory.mktemp("calm") / "run", shards=tiny_shards)
    ended = run.finished(run.launch())
    assert ended.restarts == 0
    assert len(run.lives()) == 1
    patient.reset()
    return run

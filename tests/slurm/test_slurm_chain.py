"""The chain that docs/how-to/chain-jobs.md shows, on a real Slurm: data in two parts, a training, its grade and its pictures, each
submitted before anything has run, each by the number that the one before it printed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from cluster import Cluster
from machines import until
from tiny_runs import records, words

from data_pipeline.manifest import verify

pytestmark = pytest.mark.slurm
STEPS = 6


def ecdit(cluster: Cluster, *line: object) -> str:
    return cluster.exec(sys.executable, "-m", "ecdit_train.cli", *map(str, line)).strip()


def said(folder: Path) -> str:
    return "\n".join(path.read_text(errors="replace")[-3000:] for path in sorted(folder.rglob("logs/*.out")))


def states(cluster: Cluster, job: str) -> set[str]:
    """Of a job, or of all tasks of an array."""
    lines = cluster.exec("scontrol", "show", "job", "-o", job).splitlines()
    return {line.partition("JobState=")[2].split()[0] for line in lines if "JobState=" in line}


def submit(cluster: Cluster, folder: Path, *line: object) -> str:
    return ecdit(cluster, "submit", "cluster=local", "--parsable", "--folder", folder, *line)


def test_data_training_grade(cluster, tmp_path):
    shards, run, jobs = tmp_path / "shards", tmp_path / "run", tmp_path / "jobs"
    prepare = submit(
        cluster, jobs / "data", *("--array", 2),
        *("data", "shapes", f"out={shards}", "count=60", "resolution=16", "per_shard=16", "mix={colors: 1}"),
    )  # fmt: skip
    one = ("cluster=local", "cluster.gpus_per_node=1", f"train.steps={STEPS}", "checkpoint.every_steps=3")
    train = ecdit(cluster, "launch", *words(run, shards), *one, "--parsable", "--after", prepare)
    grade = submit(cluster, jobs / "grade", "--after", train, "evaluate", f"run={run}", "tasks=colors")
    out = f"out={tmp_path}/grid.png"
    draw = submit(
        cluster, jobs / "draw", "--after", train, "sample", f"run={run}", "prompts=[a photo of a red circle]", out
    )
    everyone = [prepare, train, grade, draw]
    until(
        lambda: all(not states(cluster, job) & {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING"} for job in everyone),
        what="the chain",
        seconds=300,
        every=0.5,
    )
    assert [states(cluster, job) for job in everyone] == [{"COMPLETED"}] * 4, said(tmp_path)
    assert verify(shards).samples == 60
    assert [record["step"] for record in records(run)] == list(range(1, STEPS + 1))
    (result,) = (run / "evaluation").glob("*.json")
    assert json.loads(result.read_text())["step"] == STEPS
    assert (tmp_path / "grid.png").read_bytes()[:4] == b"\x89PNG"
    assert ecdit(cluster, "status", run).splitlines()[1] == "state       finished"


def test_a_job_that_waits_is_seen_and_taken_out(cluster, tiny_shards, tmp_path):
    """Nothing of it has run: `status` and `stop` know it from its submission."""
    run = tmp_path / "run"
    first = cluster.submit("--output=/dev/null", "--wrap=sleep 600")
    job = ecdit(cluster, "launch", *words(run, tiny_shards), "cluster=local", "--parsable", "--after", str(first))
    until(lambda: cluster.job(int(job)).reason == "Dependency", what="the reason", seconds=30)
    line = ecdit(cluster, "status", run).splitlines()[1]
    assert line == f"state       waits in the queue: job {job}: PENDING (Dependency)"
    assert "it is cancelled" in ecdit(cluster, "stop", run)
    assert states(cluster, job) == {"CANCELLED"}
    last = cluster.attempt(sys.executable, "-m", "ecdit_train.cli", "status", str(run))
    assert (last.returncode, last.stdout.splitlines()[1]) == (0, "state       not begun")


def test_doctor_knows_the_cluster(cluster, tiny_shards, tmp_path):
    """Asked on the login node, and as a job on a node."""
    told = ecdit(cluster, "doctor", *words(tmp_path / "run", tiny_shards), "cluster=local", "cluster.nodes=2")
    table = {line.split()[1]: line for line in told.splitlines() if line.startswith(("ok", "warning"))}
    assert table["slurm"].startswith("ok")
    assert table["partitions"].endswith("can run the job now or later")
    assert "\nfail" not in told
    wrong = cluster.attempt(
        *(sys.executable, "-m", "ecdit_train.cli", "doctor", *words(tmp_path / "run", tiny_shards)),
        *("cluster=local", "cluster.partition=nowhere"),
    )
    assert wrong.returncode == 90
    assert "fail     partitions" in wrong.stdout
    job = submit(cluster, tmp_path / "job", "doctor")
    cluster.wait(int(job), "COMPLETED", seconds=120)
    assert "ok       all-reduce" in said(tmp_path)


def test_nothing_comes_after_what_has_failed(cluster, tmp_path):
    """And a dependency on a job that Slurm has forgotten, or never had, is no reason to wait for ever."""
    broken = submit(cluster, tmp_path / "a", "data", "verify", tmp_path / "nothing")
    after = submit(cluster, tmp_path / "b", "--after", broken, "data", "verify", tmp_path / "nothing")
    until(lambda: states(cluster, after) == {"CANCELLED"}, what="the second to be taken out", seconds=60, every=0.2)
    assert states(cluster, broken) == {"FAILED"}
    assert cluster.job(int(broken)).exit_code == 60, said(tmp_path)

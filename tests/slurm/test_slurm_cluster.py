"""The cluster that the drills stand on: it is what it says, and leaves nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cluster import Cluster
from machines import environment, until

HERE = Path(__file__).parent
GOLDEN = sorted((HERE.parent / "golden" / "sbatch").glob("*.sh"))

STUBBORN = """#!/bin/bash
trap '' TERM
setsid bash -c 'trap "" TERM; while :; do sleep 1; done' stubborn &
while :; do sleep 1; done
"""

LOST = """#!/bin/bash
#SBATCH --nodes=2 --ntasks-per-node=1 --exclusive --requeue --time=10
[ "${SLURM_RESTART_COUNT:-0}" -ge 1 ] && exit 0
cd "$1"
srun --no-kill sleep 1000 &
until [ -e lost ]; do sleep 0.1; done
scancel "$SLURM_JOB_ID.0"
[ "$2" = keeps ] || scontrol update jobid="$SLURM_JOB_ID" nodelist="$SLURMD_NODENAME"
trap '' TERM
scontrol requeue "$SLURM_JOB_ID"
[ "$2" = keeps ] || scontrol update jobid="$SLURM_JOB_ID" numnodes=2 excnodelist="$(cat lost)"
sleep 100
"""


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_nodes_are_machines(cluster):
    """Names, networks and processes of their own, one shared file system."""
    assert sorted(cluster.exec("srun", "-N4", "hostname").split()) == ["n1", "n2", "n3", "n4"]
    pids = cluster.exec("srun", "-N4", "bash", "-c", "cat /proc/1/cmdline | tr '\\0' ' '; ip -o -4 address show eth0")
    assert {f"10.77.0.{n}/24" for n in (11, 12, 13, 14)} <= set(pids.split())
    assert pids.count("slurmd -D") == 4
    assert not Path("/sys/class/net/br0").exists(), "nothing of it on this machine's own network"


@pytest.mark.slurm
def test_a_dead_node_and_a_cut_one(quick_cluster, tmp_path):
    """Power loss ends a node's processes, a cut cable does not; both come back, and the jobs are put back into the queue."""
    script = tmp_path / "sleep.sh"
    script.write_text('#!/bin/bash\n[ "${SLURM_RESTART_COUNT:-0}" -ge 1 ] && exit 0\nsrun sleep 1000\n')

    def at_work() -> bool:
        return quick_cluster.runs(other, "1000")

    for event in ("cut", "dead"):
        job = quick_cluster.submit("--nodes=2", "--requeue", "--output=/dev/null", script)
        *_, other = quick_cluster.wait(job, "RUNNING").nodes
        until(at_work, what="the step", seconds=10)
        if event == "cut":
            quick_cluster.link(other, up=False)
        else:
            quick_cluster.kill_node(other)
        assert quick_cluster.wait(job, "COMPLETED", seconds=60).restarts == 1
        if event == "cut":
            assert at_work(), "the stale one lives on"
        quick_cluster.reset()
        assert other in quick_cluster.idle()
        assert not at_work()


@pytest.mark.slurm
@pytest.mark.parametrize("what", ["keeps", "lets go"])
def test_a_requeue_waits_for_a_dead_node_that_the_job_still_has(what, cluster, tmp_path):
    """Why our supervisor does not requeue a job with a dead node, but submits it again: it comes back after SlurmdTimeout only.
    The other way round this: a job that has let its dead node go, and then asks for another in its place, is back in seconds."""
    script = tmp_path / "lost.sh"
    script.write_text(LOST)
    job = cluster.submit(f"--output={tmp_path}/out", script, tmp_path, what)
    *_, other = cluster.wait(job, "RUNNING").nodes
    until(lambda: cluster.runs(other, "1000"), what="the step", seconds=10)
    cluster.kill_node(other)
    (tmp_path / "lost").write_text(other)
    if what == "lets go":
        ended = cluster.wait(job, "COMPLETED", seconds=45)
        assert (ended.restarts, len(ended.nodes)) == (1, 2)
        assert other not in ended.nodes
        return
    cluster.wait(job, "COMPLETING", seconds=20)
    time.sleep(12)
    assert cluster.job(job).state == "COMPLETING"
    cluster.start_node(other)
    assert cluster.wait(job, "COMPLETED", seconds=45).restarts == 1


def test_down_leaves_nothing(possible, tmp_path):
    """Not even processes that ignore SIGTERM, or left their job's session."""
    script = tmp_path / "stubborn.sh"
    script.write_text(STUBBORN)
    with Cluster(nodes=2) as cluster:
        folder, job = cluster.folder, cluster.submit("--nodes=1", "--output=/dev/null", script)
        cluster.wait(job, "RUNNING")
        until(lambda: cluster.runs("n1", "stubborn"), what="the job's processes", seconds=10)
        pids = cluster.all_pids()
        assert len(pids) >= 9
    until(lambda: not alive(pids), what="the cluster's processes to end", seconds=5)
    assert not folder.exists()


def test_a_test_run_that_is_killed_leaves_no_daemon(possible):
    """The kernel ends the cluster with the process that made it."""
    code = """
import time
from cluster import Cluster
cluster = Cluster(nodes=1).up()
print(cluster.folder, *cluster.all_pids(), flush=True)
time.sleep(100)
"""
    env = {**environment(), "PYTHONPATH": str(HERE)}
    owner = subprocess.Popen([sys.executable, "-c", code], env=env, text=True, stdout=subprocess.PIPE)
    assert owner.stdout is not None
    folder, *pids = owner.stdout.readline().split()
    assert len(alive([int(pid) for pid in pids])) >= 5
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    until(lambda: not alive([int(pid) for pid in pids]), what="its processes to end", seconds=5)
    subprocess.run(["rm", "-r", folder], check=True)


def test_it_can_be_refused(monkeypatch, tmp_path):
    """Where packages are missing the reason is a command that mends it."""
    monkeypatch.setattr("machines.PATH", os.fspath(tmp_path))
    assert Cluster.not_possible().endswith("not found: make slurm-deps")


@pytest.mark.parametrize("script", GOLDEN, ids=lambda path: path.stem)
def test_golden_scripts_would_run(script, cluster):
    """`sbatch` takes every line of them, and finds the nodes, GPUs and cores that they ask for; not one more of any."""
    asked = cluster.attempt("sbatch", "--test-only", "--partition=gpus", script)
    assert asked.returncode == 0, asked.stderr
    nodes = int(script.read_text().partition("--nodes=")[2].split()[0])
    assert f"using {96 * nodes} processors" in asked.stderr
    for more in ("--nodes=9", "--gpus-per-node=9", "--cpus-per-task=97"):
        refused = cluster.attempt("sbatch", "--test-only", "--partition=gpus", more, script)
        assert "not available" in refused.stderr, more

"""What can happen to a job. Each does it and returns what mends it: called once the run is under way again, or at the end."""

from __future__ import annotations

import signal
from collections.abc import Callable

from drills import Run
from machines import until

Mend = Callable[[], None]


def nothing() -> None:
    pass


def requeue(run: Run, job: int) -> Mend:
    run.cluster.exec("scontrol", "requeue", str(job))
    return nothing


def preemption(run: Run, job: int) -> Mend:
    """A job of all nodes, of a partition with the higher tier."""
    urgent = run.cluster.submit(
        *("--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null"), "--wrap=srun sleep 1"
    )
    run.cluster.wait(urgent, "COMPLETED")
    return nothing


def time_limit(run: Run, job: int) -> Mend:
    """The limit comes so close that Slurm warns when it looks next, within 30 s. The job gets more time for its next attempt."""
    before = run.cluster.job(job).restarts
    run.cluster.exec("scontrol", "update", f"jobid={job}", f"timelimit={run.cluster.job(job).minutes + 2}")
    until(lambda: run.cluster.job(job).restarts > before, what="the warning and the requeue", seconds=100, every=0.1)
    run.cluster.exec("scontrol", "update", f"jobid={job}", "timelimit=60")
    return nothing


def warning(run: Run, job: int) -> Mend:
    """What Slurm sends ahead of a limit, the way it sends it: to the batch shell alone."""
    run.cluster.exec("scancel", "--batch", "--signal=USR2", str(job))
    return nothing


def batch_host_lost(run: Run, job: int) -> Mend:
    host = run.cluster.job(job).batch_host
    assert host is not None
    return _lost(run, host)


def other_node_lost(run: Run, job: int) -> Mend:
    return _lost(run, run.cluster.job(job).nodes[-1])


def network_split(run: Run, job: int) -> Mend:
    """The node and its rank live on, and nobody hears them."""
    other = run.cluster.job(job).nodes[-1]
    run.cluster.link(other, up=False)
    return lambda: run.cluster.link(other, up=True)


def rank_killed(run: Run, job: int) -> Mend:
    run.rank(job, 1)[1].kill(signal.SIGKILL)
    return nothing


def first_rank_killed(run: Run, job: int) -> Mend:
    run.rank(job, 0)[1].kill(signal.SIGKILL)
    return nothing


def rank_stopped(run: Run, job: int) -> Mend:
    """SIGSTOP: it lives, and does nothing any more."""
    run.rank(job, 1)[1].kill(signal.SIGSTOP)
    return nothing


def launch_failure(run: Run, job: int) -> Mend:
    """A rank is killed, and slurmd of its node does not answer when the next step is to be started."""
    node, rank = run.rank(job, 1)
    run.cluster.freeze(node, "slurmd")
    rank.kill(signal.SIGKILL)

    def thaw() -> None:
        if node in run.cluster.on():
            run.cluster.freeze(node, "slurmd", thaw=True)

    return thaw


def _lost(run: Run, node: str) -> Mend:
    run.cluster.kill_node(node)

    def on() -> None:
        if node not in run.cluster.on():
            run.cluster.start_node(node)

    return on

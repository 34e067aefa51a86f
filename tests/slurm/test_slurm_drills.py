"""Runs of two nodes under `ecdit launch` that something happens to, on a real Slurm: each comes back by itself and ends bit for bit
as the run that nothing happened to, or stops for good with a code that says why.

Three of them are in the default suite, the others in `make test-slurm`; an hour of them is in test_slurm_soak.py.
"""

from __future__ import annotations

import time

import events
import pytest
from cluster import Cluster
from drills import EARLY, Run, assert_as_calm
from machines import until

slurm = pytest.mark.slurm
BACK = 150.0
"""Seconds in which a run must be back where nothing has to be waited for; half of Slurm's default SlurmdTimeout."""


SLOW = ("moe.experts.pause=0.4", "cluster.signal_lead=120")
"""A minute of steps, for what takes its time to happen; and a warning long before the limit."""


def drill(run, calm, event, record_property, *, what: str, words: tuple[str, ...] = ()) -> int:
    """Launch, let `event` happen in the middle, wait for a new life's first step, mend, and compare. The job's first number."""
    job = run.launch(*words)
    run.reach(EARLY)
    began = time.time()
    mend = event(run, job)
    seconds = run.new_step(began)
    record_property(f"{what} to a new step", seconds)
    assert seconds < BACK
    mend()
    run.finished(job)
    assert_as_calm(run, calm)
    return job


def test_requeued_by_hand(run, calm, record_property):
    """Asked to stop, saved, back in the queue under the same number, gone on without a step lost."""
    job = drill(run, calm, events.requeue, record_property, what="scontrol requeue")
    assert run.cluster.job(job).restarts == 1
    assert [line["step"] for life in run.lives() for line in life if "step" in line] == run.all_steps(), (
        "none done twice"
    )


@pytest.mark.parametrize("event", [
    events.rank_killed,
    *(pytest.param(e, marks=slurm) for e in (events.first_rank_killed, events.rank_stopped)),
], ids=lambda event: event.__name__)  # fmt: skip
def test_comes_back_in_its_allocation(event, run, calm, record_property):
    """A life that ends without a word is followed by another one on the same nodes, from the last committed step."""
    job = drill(run, calm, event, record_property, what=event.__name__)
    assert run.cluster.job(job).restarts == 0
    assert [(line["then"], line["life"]) for line in run.decisions(job) if line["what"] == "decision"] == [
        ("again", 1),
        ("done", 2),
    ]


@slurm
@pytest.mark.parametrize("event", [events.preemption, events.time_limit, events.warning], ids=lambda e: e.__name__)
def test_comes_back_after_a_word_before(event, run, calm, record_property):
    """Announced ends lose no step: what was done is saved, and the job is requeued."""
    words = SLOW if event is events.time_limit else ()
    job = drill(run, calm, event, record_property, what=event.__name__, words=words)
    assert run.cluster.job(job).restarts == 1
    assert [line["step"] for life in run.lives() for line in life if "step" in line] == run.all_steps(), (
        "none done twice"
    )


@slurm
def test_preemption_with_a_grace(possible, tiny_shards, tmp_path):
    """At its beginning Slurm's SIGTERM goes to the steps alone: the ranks save, and the supervisor asks what it was for."""
    graced = (
        "PartitionName=graced Nodes=n[1-4] MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60"
    )
    with Cluster(extra=graced) as cluster:
        run = Run(cluster, folder=tmp_path / "run", shards=tiny_shards)
        job = run.launch("cluster.partition=graced", *SLOW)
        run.reach(EARLY)
        mend = events.preemption(run, job)
        until(lambda: cluster.job(job).restarts, what="the requeue", seconds=50)
        decided = [line for line in run.decisions(job) if line["what"] == "decision"]
        assert [(line["then"], line["warned"]) for line in decided] == [("requeue", ["PREEMPTED"])]
        mend()
        run.finished(job)
        assert [line["step"] for life in run.lives() for line in life if "step" in line] == run.all_steps()


@slurm
def test_warned_before_there_are_ranks(run, calm):
    """The warning comes while the job starts; nothing is lost, and the time that is left is not waited for."""
    job = run.launch()
    run.cluster.wait(job, "RUNNING", seconds=60)
    # As Slurm itself does it (`--signal=B:USR2`); but its own clock is up to half a minute late, and ranks start in less.
    run.cluster.exec("scancel", "--batch", "--signal=USR2", str(job))
    until(lambda: run.cluster.job(job).restarts, what="the requeue", seconds=180)
    assert sum(len(life) - 1 for life in run.lives()) <= 1, "at most the step that every life makes"
    run.finished(job)
    assert_as_calm(run, calm)


@slurm
@pytest.mark.parametrize(
    "event", [events.other_node_lost, events.launch_failure, events.network_split], ids=lambda event: event.__name__
)
def test_a_silent_node_does_not_hold_the_job(event, run, calm, record_property):
    """Long before Slurm itself would call the node down, the job goes on without it; a job that waits for its end gets it."""
    waiting: list[int] = []

    def happens(run: Run, job: int) -> events.Mend:
        waiting.append(run.cluster.submit(f"--dependency=afterok:{job}", "--output=/dev/null", "--wrap=true"))
        return event(run, job)

    job = drill(run, calm, happens, record_property, what=f"{event.__name__} (SlurmdTimeout=300)")
    assert run.current(job) == job
    run.cluster.wait(waiting[0], "COMPLETED", seconds=30)


@slurm
@pytest.mark.parametrize(
    "event", [events.batch_host_lost, events.other_node_lost, events.network_split], ids=lambda event: event.__name__
)
def test_a_node_is_lost(event, quick_run, calm, record_property):
    """Slurm finds it out as well, after three seconds; whoever is first, the job goes on once."""
    job = drill(quick_run, calm, event, record_property, what=f"{event.__name__} (SlurmdTimeout=3)")
    assert quick_run.current(job) == job


@slurm
def test_a_stale_rank_writes_nothing(quick_run, calm):
    """The rank behind a cut cable is the one that writes. It lives while the next life runs to its end, and changes nothing."""
    # Its own watchdog would end it, a few seconds after the others are gone.
    run, job = quick_run, quick_run.launch("watch.step=180", "watch.data=180")
    run.reach(EARLY)
    node, rank = run.rank(job, 0)
    began = time.time()
    run.cluster.link(node, up=False)
    run.new_step(began)
    assert rank.pid in [process.pid for process in run.cluster.processes_of(node)], "nothing stale to be seen"
    run.finished(job)
    run.cluster.link(node, up=True)
    run.cluster.wait_idle(seconds=90)  # the stale rank meets the world again, and ends
    assert_as_calm(run, calm)


@slurm
def test_always_crashing(run):
    """Three lives without a newer checkpoint, and the job stops for good."""
    job = run.launch("moe.experts.fatal=true", "cluster.back_off=[1.0,2.0]")
    run.refused(job, 76)
    assert run.cluster.job(job).restarts == 0
    assert len([line for line in run.decisions(job) if line["what"] == "life"]) == 3


def test_two_submissions(run, calm):
    """The second job finds that the folder is another's and stops with 85; the first is not touched."""
    first = run.launch()
    run.reach(1)
    second = run.cluster.submit(run.folder / "job.sh")  # `ecdit launch` refuses: tests/unit/launch/test_submit.py
    run.refused(second, 85)
    assert run.finished(first).restarts == 0
    assert len(run.lives()) == 1
    assert_as_calm(run, calm)


@slurm
def test_cancelled(run, calm):
    """Saved, nothing left on the nodes, not requeued; launched again it goes on."""
    job = run.launch()
    run.reach(EARLY)
    run.cluster.exec("scancel", str(job))
    run.cluster.wait(job, "CANCELLED", seconds=60)
    run.cluster.wait_idle(seconds=60)
    time.sleep(8)  # longer than a requeue takes
    assert run.cluster.job(job).state == "CANCELLED"
    run.finished(run.launch())
    assert_as_calm(run, calm)

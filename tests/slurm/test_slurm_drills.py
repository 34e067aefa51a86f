"""Runs of two nodes under `ecdit launch` that something happens to, on a real Slurm. Here the few that every change must pass; the
others are in test_slurm_events.py, and an hour of them in test_slurm_soak.py (`make test-slurm`)."""

from __future__ import annotations

import signal

import pytest
from drills import START, assert_as_calm, moment

EARLY = 25
"""The step at which things happen: one checkpoint is there, and some steps after it."""


def test_requeued_by_hand(run, calm, record_property):
    """`scontrol requeue`: asked to stop, saved, back in the queue under the same number, gone on without a step lost."""
    job = run.launch()
    run.reach(EARLY)
    event = moment()
    run.cluster.exec("scontrol", "requeue", str(job))
    record_property("scontrol requeue to a new step", run.new_step(event))
    assert run.finished(job).restarts == 1
    assert_as_calm(run, calm)


def test_a_rank_is_killed(run, calm, record_property):
    """A life that ends without a word is followed by another in the same allocation, from the last committed step."""
    job = run.launch()
    run.reach(EARLY)
    _, rank = run.rank(job, 1)
    event = moment()
    rank.kill(signal.SIGKILL)
    record_property("kill -9 of a rank to a new step", run.new_step(event))
    assert run.finished(job).restarts == 0
    assert_as_calm(run, calm)
    again, done = run.decisions(job)
    assert "137" in str(again) or "SIGKILL" in str(again)
    assert again != done


def test_two_submissions(run, calm):
    """The second job finds that the folder is another's and stops with 85; the first is not touched."""
    first = run.launch()
    run.reach(1)
    path = run.folder / "job.sh"
    second = run.cluster.submit(path)  # `ecdit launch` would refuse: tests/unit/launch
    run.refused(second, 85)
    assert run.finished(first).restarts == 0
    assert len(run.lives()) == 1
    assert_as_calm(run, calm)


@pytest.mark.slurm
def test_a_rank_stands_still(run, calm, record_property):
    """SIGSTOP of a rank: the watchdog ends all, the supervisor begins again."""
    job = run.launch()
    run.reach(EARLY)
    _, rank = run.rank(job, 1)
    event = moment()
    rank.kill(signal.SIGSTOP)
    record_property("SIGSTOP of a rank to a new step", run.new_step(event, seconds=START + 30))
    assert run.finished(job).restarts == 0
    assert_as_calm(run, calm)

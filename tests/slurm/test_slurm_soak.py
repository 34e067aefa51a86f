"""An hour in which something happens to a run every minute, drawn from the list of events.py.

A run is short against an hour, so several are made, one after the other; each ends bit for bit as the one that nothing happened to.
`ECDIT_SOAK_SECONDS` makes it shorter or longer, `ECDIT_SOAK_SEED` draws the same faults again.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter

import events
import pytest
from drills import START, Run, assert_as_calm

SECONDS = float(os.environ.get("ECDIT_SOAK_SECONDS", "3600"))
SEED = int(os.environ.get("ECDIT_SOAK_SEED", "0"))
EVERY = 60.0
STEPS = 1600
LIST = (
    *(events.requeue, events.preemption, events.warning, events.rank_killed, events.first_rank_killed),
    *(events.rank_stopped, events.other_node_lost, events.batch_host_lost, events.network_split, events.launch_failure),
)
WORDS = (f"train.steps={STEPS}", "cluster.lives=1000", "cluster.lives_without_progress=10", "cluster.back_off=[1.0]")
"""A seeded draw may hit the same run four times before its next checkpoint, which is no reason for it to give up."""


@pytest.fixture(scope="module")
def long_calm(hasty, tiny_shards, tmp_path_factory) -> Run:
    run = Run(hasty, folder=tmp_path_factory.mktemp("long-calm") / "run", shards=tiny_shards, steps=STEPS)
    run.finished(run.launch(*WORDS), seconds=START + STEPS)
    hasty.reset()
    return run


@pytest.mark.slurm
def test_an_hour_of_faults(long_calm, hasty, tiny_shards, tmp_path, record_property):
    draw, done, ends = random.Random(SEED), Counter[str](), time.monotonic() + SECONDS
    number = 0
    while time.monotonic() < ends:
        number += 1
        run = Run(hasty, folder=tmp_path / f"run-{number}", shards=tiny_shards, steps=STEPS)
        job = run.launch(*WORDS)
        done += _faults(run, job, draw=draw, ends=ends)
        run.finished(job, seconds=START + STEPS)
        assert_as_calm(run, long_calm)
        hasty.reset()
    for name, count in done.items():
        record_property(name, count)
    assert done.total() >= SECONDS / EVERY / 2, done


def _faults(run: Run, job: int, *, draw: random.Random, ends: float) -> Counter[str]:
    """One a minute until the run or the hour is nearly over, at a moment that has nothing to do with what the run does then."""
    done = Counter[str]()
    run.reach(1)
    while True:
        minute = time.monotonic()
        event = draw.choice(LIST)
        time.sleep(draw.uniform(0.0, 10.0))
        if run.step() > STEPS - 100 or time.monotonic() > ends:
            return done
        began = time.time()
        mend = event(run, run.current(job))
        run.new_step(began, seconds=2 * START)
        mend()
        done[event.__name__] += 1
        time.sleep(max(0.0, EVERY - (time.monotonic() - minute)))

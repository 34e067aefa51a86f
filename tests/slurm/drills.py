"""A small run of two nodes under `ecdit launch`, and whether it ended as the one that nothing happened to."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from cluster import ENDED, Cluster, Job
from machines import Process, until
from tiny_runs import records, steady, words

from ecdit_train.checkpoint import find, read_objects
from ecdit_train.checkpoint.compare import compare

STEPS = 160
EARLY = 25
"""The step at which things happen: one checkpoint is there, and some steps after it."""
LAB = Path(__file__).parent / "lab"
WORDS = (
    *("cluster=local", "cluster.nodes=2", "parallel=pair", "moe/experts=drill", f"--config-dir={LAB}"),
    *(f"train.steps={STEPS}", "checkpoint.every_steps=20", "optim.schedule=constant"),
    *("observe/sinks=wandb", "watch.lease=6", "watch.grace=30", "watch.data=15", "watch.step=15", "watch.save=60"),
)
"""Two ranks, eight seconds of steps of at least 50 ms."""
START = 240.0
"""Seconds to the first step, on a machine that has other work."""
OBJECTS = ("loader", "guard", "quarantine", "pool", "window")
"""What a checkpoint holds beside its tensors: the data position, the losses that the guard has seen, bad samples, ..."""


class Run:
    """A run folder and the jobs that were submitted for it."""

    def __init__(self, cluster: Cluster, *, folder: Path, shards: Path, steps: int = STEPS) -> None:
        """`steps`: as many as `launch` is given."""
        self.cluster, self.folder, self.shards, self.steps = cluster, folder, shards, steps

    # --- what a user does ---------------------------------------------------------------------------------------------

    def launch(self, *extra: str) -> int:
        """`ecdit launch`; the job's number. `extra` words win over ours."""
        mine = [w for w in words(self.folder, self.shards, *WORDS) if w.partition("=")[0] not in _keys(extra)]
        said = self.ecdit("launch", *mine, *extra)
        found = re.search(r"\bjob (\d+)\b", said)
        assert found, said
        return int(found[1])

    def ecdit(self, *line: str) -> str:
        return self.cluster.exec(sys.executable, "-m", "ecdit_train.cli", *line)

    # --- what can be seen ---------------------------------------------------------------------------------------------

    def step(self) -> int:
        """The newest logged one."""
        return max((int(record["step"]) for life in self.lives() for record in life[1:]), default=0)

    def lives(self) -> list[list[dict]]:
        """The lines of each life's records, whole ones only; the first says from where it goes on."""
        texts = [path.read_text() for path in sorted((self.folder / "metrics").glob("*.jsonl"))]
        return [[json.loads(line) for line in text.split("\n")[:-1]] for text in texts if "\n" in text]

    def reach(self, step: int, *, seconds: float = START) -> None:
        until(lambda: self.step() >= step, what=f"step {step} of {self.folder}", seconds=seconds, every=0.05)

    def new_step(self, after: float, *, seconds: float = START) -> float:
        """Waits for the first step of a life that began after the moment `after` (of `time.time`); the seconds between."""

        def first() -> list[float]:
            begun = [life for life in self.lives() if len(life) > 1 and life[0]["time"] > after]
            return [life[1]["time"] for life in begun]

        until(first, what=f"a step of a new life of {self.folder}", seconds=seconds, every=0.05)
        return round(min(first()) - after, 1)

    def all_steps(self) -> list[int]:
        return list(range(1, self.steps + 1))

    def rank(self, job: int, number: int) -> tuple[str, Process]:
        """The node and the process of a rank."""
        found = [
            (n, p)
            for n in self.cluster.job(job).nodes
            for p in self.cluster.ranks_of(n)
            if p.env["RANK"] == str(number)
        ]
        assert len(found) == 1, found
        return found[0]

    def decisions(self, job: int) -> list[dict]:
        """What the job's supervisor did and decided, one after the other."""
        path = self.folder / "jobs" / f"{job}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def current(self, job: int) -> int:
        """The number under which the job goes on: its own, unless the supervisor had to submit it again."""
        while (to := [line["to"] for line in self.decisions(job) if line["what"] == "resubmitted"]) != []:
            job = int(to[-1])
        return job

    def finished(self, job: int, *, seconds: float = START) -> Job:
        """Waits for the job, or what it goes on as, to end well."""

        def ended() -> bool:
            now = self.cluster.job(self.current(job))
            assert now.state not in ENDED or now.state == "COMPLETED" or now.id != self.current(job), self._end(now)
            return now.state == "COMPLETED"

        until(ended, what=f"the end of job {job}", seconds=seconds, every=0.2)
        last = self.cluster.job(self.current(job))
        assert (last.exit_code, last.signal) == (0, 0)
        return last

    def refused(self, job: int, code: int, *, seconds: float = START) -> Job:
        """Waits for the job to end with that code, and for good."""
        ended = self.cluster.wait(job, "FAILED", seconds=seconds)
        assert (ended.exit_code, ended.signal) == (code, 0), self.cluster.said(job)
        return ended

    def _end(self, job: Job) -> str:
        return f"{job}\n{self.cluster.said(job.id)}"


def _keys(words: Sequence[str]) -> set[str]:
    return {word.partition("=")[0] for word in words}


def assert_as_calm(run: Run, calm: Run) -> None:
    """Bitwise: every record and the last checkpoint's tensors, data position included; one W&B run; no step twice or missing."""
    lines = records(run.folder)
    assert [line["step"] for line in lines] == run.all_steps()
    assert steady(lines) == steady(records(calm.folder))
    ours, theirs = (find(r.folder / "checkpoints")[-1].path for r in (run, calm))
    compared = list(compare(theirs, ours))
    assert len(compared) > 20
    assert [tensor.name for tensor in compared if not tensor.same_bytes] == []
    mine, other = read_objects(ours), read_objects(theirs)
    assert {name: mine[name] for name in OBJECTS} == {name: other[name] for name in OBJECTS}
    assert mine["loader"]["step"] == run.steps
    one = (run.folder / "wandb_id").read_text().strip()
    assert {path.name.rpartition("-")[2] for path in (run.folder / "wandb").glob("offline-run-*")} == {one}

"""A step of an earlier life that does not end: who is to blame, and what is none of ours."""

from __future__ import annotations

import pytest
from job_stage import Stage

from ecdit_train.errors import NoProgressError

OK = {"all": "commit=9 end=0"}
HELD = "12.3|ecdit-life\n12.batch|batch\n12.4|bash\n"


def leave(stage: Stage, text: str, *, until: float = float("inf")) -> None:
    """After the first life Slurm knows these steps."""

    def look() -> None:
        if len(stage.lines("life")) == 1 and stage.clock.time < until:
            (stage.bin / "steps").write_text(text)
        elif stage.lines("life"):
            (stage.bin / "steps").unlink(missing_ok=True)

    stage.clock.at_each = look


def test_a_rank_that_cannot_be_killed_makes_its_node_bad(stage):
    leave(stage, HELD)
    assert stage.supervise({0: "cause=86 end=86", 1: "sleep"}) == 75
    assert stage.then == ["again", "requeue"]
    assert stage.lines()[-1]["bad"] == {"n2": "its processes of the last life cannot be killed"}
    assert stage.calls("scancel") == ["scancel --signal=KILL 12.3"]
    assert stage.clock.time < 300  # and not half an hour


def test_where_nobody_knows_the_node_it_ends_after_three(stage):
    def look() -> None:
        if stage.lines("life"):
            (stage.bin / "steps").write_text(HELD)

    stage.clock.at_each = look
    assert stage.supervise({"all": "end=86"}) == NoProgressError.exit_code
    assert "12.3 of an earlier life does not end" in stage.lines()[-1]["reason"]
    assert "bad" not in stage.lines()[-1]


def test_a_step_that_ends_late_costs_a_while_only(stage):
    leave(stage, HELD, until=40.0)
    assert stage.supervise({"all": "end=86"}, OK) == 0
    assert stage.calls("scancel")


@pytest.mark.parametrize("steps", ["12.4|bash\n", "12_1.3|ecdit-life\n", "13.0|ecdit-life\n"])
def test_steps_of_others_are_left_alone(steps, stage):
    """Somebody who looks into the job; another task of the array whose number the last task's is."""
    stage.environ |= {"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "4"}
    (stage.bin / "steps").write_text(steps)
    assert stage.supervise(OK) == 0
    assert not stage.calls("scancel")


def test_a_task_of_an_array_knows_its_own(stage):
    stage.environ |= {"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "4"}
    leave(stage, "12_4.3|ecdit-life\n", until=40.0)
    assert stage.supervise({"all": "end=86"}, OK) == 0
    assert stage.calls("scancel") == ["scancel --signal=KILL 12_4.3"]

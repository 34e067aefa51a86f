"""The supervisor of a job: what follows from Slurm's warnings and from nodes that it takes away, with stand-ins (`job_stage`)."""

from __future__ import annotations

import pytest
from job_stage import warn

from launch import preflight
from launch.decide import Ending

OK = {"all": "end=0"}


@pytest.fixture
def fit(monkeypatch):
    """Nodes are taken for fit, so that many lives cost little."""
    monkeypatch.setattr(preflight, "check", lambda *_, **__: Ending(code=0))


def test_a_warning_in_a_life_saves_and_requeues(stage):
    warn(stage, "USR2", when="life")
    assert stage.supervise({"all": "wait commit=7 end=75"}) == 75
    assert stage.then == ["requeue"]
    assert stage.calls("scontrol requeue") == ["scontrol requeue 12"]


def test_a_warning_before_a_life_starts_none(stage):
    stage.clock.warned.append("USR2")
    assert stage.supervise(OK) == 75
    assert not stage.lines("life")
    assert (stage.then, stage.lines()[0]["reason"]) == (["requeue"], "no life was begun")
    assert not stage.calls("srun")


def test_a_time_limit_that_lets_no_life_begin_is_not_tried_for_ever(stage):
    stage.clock.warned.append("USR2")
    assert [stage.supervise(OK) for _ in range(3)] == [75, 75, 76]
    assert stage.then == ["requeue", "requeue", "stop"]


@pytest.mark.parametrize(("warned", "at"), [("TERM", ""), ("USR2", "2026-01-02T01:00:00")])
def test_preemptions_before_a_life_are_nobodys_fault(warned, at, stage):
    """Some clusters send the warning at a preemption too (PreemptParameters=send_user_signal)."""
    stage.play("preempted", at)
    stage.clock.warned.append(warned)
    assert [stage.supervise(OK) for _ in range(4)] == [75] * 4


def test_a_warning_while_nodes_are_checked_starts_no_life(stage):
    stage.clock.at_each = lambda: stage.clock.warned.append("USR2") if not stage.clock.warned else None
    assert stage.supervise(OK) == 75
    assert not stage.lines("life")
    assert stage.then == ["requeue"]


def test_a_warning_while_it_waits_for_the_next_life(stage):
    warn(stage, "USR2", when="decision")
    assert stage.supervise({"all": "end=1"}) == 75
    assert stage.then == ["again", "requeue"]
    assert len(stage.lines("life")) == 1


def test_a_warning_and_a_failure_after_it_give_the_allocation_back(stage):
    warn(stage, "USR2", "USR2", when="life")
    assert stage.supervise({"all": "wait cause=86 end=86"}) == 75
    assert stage.then == ["requeue"]


def test_warnings_are_repeated_until_somebody_listens(stage):
    """A signal that comes before a process listens is lost: here the ranks hear the second one only."""
    warn(stage, "USR2", when="life")
    assert stage.supervise({0: "wait wait end=75", 1: "wait end=75"}) == 75


@pytest.mark.parametrize("state", ["CANCELLED|None|", "COMPLETING|None|", "PREEMPTED|None|", "PENDING|BeginTime|"])
def test_scancel_and_what_slurm_decided_are_left_to_it(state, stage):
    stage.play("state", state)
    warn(stage, "TERM", "TERM", when="life")
    assert stage.supervise({"all": "wait end=137"}) == 75  # not what a supervisor that was killed itself returns
    assert stage.then == ["leave"]
    assert not stage.calls("scontrol requeue")


@pytest.mark.parametrize("state", ["RUNNING|None|", "COMPLETING|TimeLimit|"])
def test_preemption_with_grace_and_a_time_limit_without_warning_come_back(state, stage):
    stage.play("state", state)
    warn(stage, "TERM", when="life")
    assert stage.supervise({"all": "wait end=75"}) == 75
    assert stage.then == ["requeue"]
    assert stage.calls("scontrol requeue")


@pytest.mark.parametrize("end", ["commit=5 end=75", "end=143"])
def test_a_preemption_whose_grace_only_the_steps_hear_of_comes_back(end, stage):
    """Slurm sends SIGTERM to the steps at the beginning of GraceTime, and nothing to the batch shell."""
    stage.play("preempted", "2026-01-02T01:00:00")
    assert stage.supervise({"all": end}) == 75
    assert stage.then == ["requeue"]
    assert stage.lines()[0]["warned"] == ["PREEMPTED"]
    assert stage.calls("scontrol requeue")


@pytest.mark.parametrize(("state", "then"), [("RUNNING|None|", "requeue"), ("COMPLETING|None|", "leave")])
def test_lives_that_were_preempted_do_not_count(state, then, stage, fit):
    """Three of them in a start that takes its time, and a crash after that, are no reason to give up; three crashes are."""
    stage.play("state", state)
    lives = {"without_progress": 3, "total": 3, "back_off": []}
    for _ in range(4):
        stage.clock.warned.clear()
        warn(stage, "TERM", when="life")
        assert stage.supervise({"all": "wait end=143"}, lives=lives) == 75
    assert stage.then == [then] * 4
    stage.clock.at_each = lambda: None
    stage.clock.warned.clear()
    assert stage.supervise({"all": "end=1"}, lives=lives) == 76
    assert stage.then[4:] == ["again", "again", "stop"]


def test_lives_that_a_time_limit_ended_count(stage, fit):
    for code in (75, 75, 76):
        stage.clock.warned.clear()
        warn(stage, "USR2", "TERM", when="life")
        assert stage.supervise({"all": "wait end=75"}) == code


def test_a_crash_before_a_preemption_counts(stage, fit):
    """The preemption came while it waited for the next life."""
    for code in (75, 75, 76):
        stage.clock.warned.clear()
        before = len(stage.lines())
        stage.clock.at_each = lambda n=before: (
            stage.clock.warned.append("TERM") if len(stage.lines()) > n and not stage.clock.warned else None
        )
        assert stage.supervise({"all": "end=1"}) == code


@pytest.mark.parametrize("when", ["None", "Unknown", "2026-01-01T23:00:00"])
def test_a_stop_that_slurm_did_not_ask_for_stays_stopped(when, stage):
    """The last one: an earlier attempt's preemption."""
    stage.play("preempted", when)
    assert stage.supervise({"all": "cause=75 end=75"}) == 75
    assert stage.then == ["stop"]
    assert not stage.calls("scontrol requeue")

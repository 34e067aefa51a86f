"""How a job comes back from the queue when nodes are lost or bad (`launch.comeback`), with Slurm played by stand-ins."""

from __future__ import annotations

import pytest
from job_stage import Stage, write

from ecdit_train.errors import EcditError
from launch import comeback, preflight, record
from launch.decide import Ending
from launch.slurm import Slurm

OK = {"all": "end=0"}
LOST = Ending(code=preflight.UNKNOWN, lost=("n2",))
BAD = Ending(code=preflight.UNKNOWN, bad=(("n2", "no GPU"),))


@pytest.fixture
def stage(stage):
    stage.environ["SLURMD_NODENAME"] = "n1"
    return stage


def attempt(stage: Stage, monkeypatch, ending: Ending) -> list[str]:
    """The job begins, its nodes are found like this; what Slurm is told then about the job."""
    (stage.bin / "calls").unlink(missing_ok=True)
    monkeypatch.setattr(preflight, "check", lambda *_, **__: ending)
    assert stage.supervise(OK) == 75
    return [call for call in stage.calls("scontrol") if "scontrol show" not in call]


RESUBMITTED = "sbatch --parsable --dependency= --exclude=n2 {}/job.sh"


@pytest.mark.parametrize(("refused", "calls"), [
    ("scontrol:NodeList=", ["scontrol update JobId=12 NodeList=n1"]),
    ("scontrol:requeue", ["scontrol update JobId=12 NodeList=n1", "scontrol requeue 12"]),
])  # fmt: skip
def test_what_slurm_refuses_makes_a_new_job_without_the_lost_node(refused, calls, stage, monkeypatch):
    """One that waits for nobody: the job that this one waited for once may be forgotten by now."""
    stage.play("refuse", refused)
    assert attempt(stage, monkeypatch, LOST) == calls
    assert stage.calls("sbatch --parsable") == [RESUBMITTED.format(stage.run)]
    assert [(line["to"], line["exclude"]) for line in stage.lines("resubmitted")] == [("777", ["n2"])]


def test_a_job_that_goes_on_under_another_number_is_over(stage, monkeypatch):
    """Its 75 makes Slurm bring it back where RequeueExit lists that; the new job counts on from it all the same."""
    stage.play("refuse", "scontrol:NodeList=")
    attempt(stage, monkeypatch, LOST)
    stage.environ["SLURM_RESTART_COUNT"] = "1"
    assert attempt(stage, monkeypatch, LOST) == []
    assert stage.calls("scancel") == ["scancel 12"]
    stage.environ["SLURM_JOB_ID"] = "777"
    attempt(stage, monkeypatch, LOST)
    assert not stage.calls("scancel")
    assert [line["what"] for line in record.read(stage.run, "777")].count("resubmitted") == 2


def test_jobs_that_wait_for_it_wait_for_the_new_one(stage, monkeypatch, capfd):
    """Slurm would cancel them (`--kill-on-invalid-dep`) when this number ends with 75."""
    waiting = [
        "20|afterok:12(unfulfilled)",
        "21|afterany:9(unfulfilled),afterok:12(unfulfilled)",
        "22_[1-3]|afterok:12_*(unfulfilled)",
    ]
    stage.play(
        "waiting", "\n".join([*waiting, "23|afterok:112(unfulfilled)", "24|", "25_[1-3]|afternotok:12(unfulfilled)"])
    )
    stage.play("refuse", "scontrol:NodeList=", "scontrol:JobId=25")
    calls = attempt(stage, monkeypatch, LOST)
    assert calls[1:] == [
        "scontrol update JobId=20 Dependency=afterok:777",
        "scontrol update JobId=21 Dependency=afterany:9,afterok:777",
        "scontrol update JobId=25_[1-3] Dependency=afternotok:777",
    ]
    err = capfd.readouterr().err
    assert "20, 21 waited for this job: now for job 777" in err
    assert "cannot be told to wait for job 777: 25_[1-3]: scontrol: error: Operation not permitted" in err


def test_a_node_cannot_let_itself_go(stage, monkeypatch):
    stage.environ["SLURMD_NODENAME"] = "n2"
    assert attempt(stage, monkeypatch, LOST) == []
    assert stage.calls("sbatch --parsable") == [RESUBMITTED.format(stage.run)]


@pytest.mark.parametrize("state", ["PENDING|BeginTime|", "COMPLETING|NodeDown|"])
def test_where_slurm_was_first_there_is_no_second_job(state, stage, monkeypatch):
    """A pending job's NodeList is the nodes that it must get."""
    stage.play("state", state)
    stage.play("refuse", "scontrol:requeue")
    assert attempt(stage, monkeypatch, LOST) == ["scontrol update JobId=12 ExcNodeList=n2"]
    assert not stage.calls("sbatch --parsable")


@pytest.mark.parametrize("state", ["COMPLETING|None|", "CANCELLED|None|"])
def test_a_job_that_is_cancelled_meanwhile_does_not_rise(state, stage, monkeypatch):
    stage.play("state", state)
    calls = attempt(stage, monkeypatch, LOST)
    assert not [call for call in calls if "requeue" in call or "NodeList=n1" in call]
    assert not stage.calls("sbatch --parsable")
    assert not stage.lines("stuck")


def test_an_attempt_over_its_time_limit_that_cannot_be_requeued_becomes_a_new_job(stage, monkeypatch):
    stage.play("state", "COMPLETING|TimeLimit|")
    stage.play("refuse", "scontrol:requeue")
    stage.clock.warned.append("TERM")
    assert attempt(stage, monkeypatch, Ending(code=0)) == ["scontrol requeue 12"]
    assert [line["to"] for line in stage.lines("resubmitted")] == ["777"]


AWAY = "echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2; exit 1"


def absent(stage: Stage, *programs: str, until: float) -> None:
    """The controller is away until that moment."""
    real = {name: (stage.bin / name).read_text() for name in programs}
    for name in programs:
        write(stage.bin / name, f"#!/bin/sh\n{AWAY}\n")

    def back() -> None:
        if stage.clock.time >= until and real:
            for name in programs:
                write(stage.bin / name, real.pop(name))

    stage.clock.at_each = back


@pytest.mark.parametrize("ending", [Ending(code=0), BAD, LOST], ids=["warned", "bad", "lost"])
def test_a_controller_that_is_away_is_waited_for(ending, stage, monkeypatch):
    """An upgrade of some minutes in the very moment of the time limit."""
    stage.environ["SLURM_JOB_NODELIST"] = "n1"  # its names are no question for scontrol
    stage.nodes = ("n1",)
    absent(stage, "scontrol", "squeue", "sbatch", until=200.0)
    if not ending.code:
        stage.clock.warned.append("USR2")
    calls = attempt(stage, monkeypatch, ending)
    assert "scontrol requeue 12" in calls
    assert not stage.lines("resubmitted")
    assert 200 <= stage.clock.time < 300


def test_a_requeue_that_was_heard_but_not_answered_is_no_second_job(stage, monkeypatch):
    """What is not known is asked again: the job waits already."""
    answers = ["timed out after 60 seconds", "Job is pending execution"]

    def requeue(slurm: Slurm) -> str:
        stage.play("refuse", "squeue") if len(answers) == 2 else stage.play("refuse")
        stage.play("state", "PENDING|BeginTime|")
        return answers.pop(0)

    monkeypatch.setattr(Slurm, "requeue", requeue)
    stage.clock.warned.append("USR2")
    attempt(stage, monkeypatch, Ending(code=0))
    assert not stage.calls("sbatch")


def test_a_refusal_of_unknown_kind_is_tried_for_a_while(stage, monkeypatch):
    monkeypatch.setattr(comeback, "TRY_SECONDS", 100.0)
    monkeypatch.setattr(Slurm, "requeue", lambda slurm: "Slurm is in a bad mood")
    stage.clock.warned.append("USR2")
    attempt(stage, monkeypatch, Ending(code=0))
    assert stage.clock.time >= 100.0
    assert [line["to"] for line in stage.lines("resubmitted")] == ["777"]


def test_an_attempt_with_too_few_nodes_asks_for_all_again(stage, monkeypatch):
    """Slurm ended the supervisor before it could say how many nodes the requeued job needs."""
    stage.environ |= {"SLURM_JOB_NODELIST": "n1", "SLURM_RESTART_COUNT": "1"}
    stage.play("state", "RUNNING|None|n2")
    for _ in range(3):
        calls = attempt(stage, monkeypatch, Ending(code=0))
        assert calls == ["scontrol requeue 12", "scontrol update JobId=12 NumNodes=2"]
    assert not stage.lines("life")
    with pytest.raises(EcditError, match=r"needs 2 nodes, and was given 1 \(n1\) 4 times in a row"):
        stage.supervise(OK)


def test_lost_nodes_that_are_up_again_are_forgotten_and_others_are_not(stage, monkeypatch):
    """n9 is the user's; n2 was lost and n1 is bad, so that `sinfo` has nothing against it."""
    stage.play("state", "RUNNING|None|n9")
    attempt(stage, monkeypatch, LOST)
    stage.play("state", "RUNNING|None|n9,n2")
    assert attempt(stage, monkeypatch, BAD_FIRST)[-1] == "scontrol update JobId=12 ExcNodeList=n9,n2,n1"
    stage.play("up", "n1 n2 n9")
    stage.play("state", "RUNNING|None|n9,n2,n1")
    stage.clock.warned.append("USR2")
    assert attempt(stage, monkeypatch, Ending(code=0))[-1] == "scontrol update JobId=12 ExcNodeList=n9,n1"


BAD_FIRST = Ending(code=preflight.UNKNOWN, bad=(("n1", "no GPU"),))


def test_a_job_that_needs_every_node_waits_for_the_lost_one(stage, monkeypatch):
    """A job that must not get so many nodes that it can never start is held by Slurm for good."""
    stage.play("refuse", "sbatch:--test-only")
    calls = attempt(stage, monkeypatch, LOST)
    assert calls[-1] == "scontrol update JobId=12 NumNodes=2"
    assert not stage.lines("excluded")


def test_a_job_that_needs_a_bad_node_stops_after_some_attempts(stage, monkeypatch):
    stage.play("refuse", "sbatch:--test-only")
    for _ in range(3):
        assert attempt(stage, monkeypatch, BAD) == ["scontrol requeue 12"]
    history = record.history(record.read(stage.run, "12"), committed=-1)
    assert history.without_progress == 3
    monkeypatch.setattr(preflight, "check", lambda *_, **__: BAD)
    assert stage.supervise(OK) == 76


def test_a_job_that_needs_a_lost_node_and_cannot_let_it_go_stops_too(stage, monkeypatch):
    """And not before Slurm has had some minutes to find out itself that the node is down."""
    stage.play("refuse", "sbatch:--test-only", "scontrol:update")
    for _ in range(3):
        attempt(stage, monkeypatch, LOST)
    assert not stage.lines("excluded")
    assert stage.clock.time >= 15 + 60 + 240
    monkeypatch.setattr(preflight, "check", lambda *_, **__: LOST)
    assert stage.supervise(OK) == 76


def test_where_users_may_not_change_a_job_the_bad_node_is_left_out_by_a_new_one(stage, monkeypatch):
    """Once refused, the job is known to come back on the same nodes; nothing is said to be excluded that is not."""
    stage.play("refuse", "scontrol:update")
    assert attempt(stage, monkeypatch, BAD) == ["scontrol requeue 12", "scontrol update JobId=12 ExcNodeList=n2"]
    assert not stage.lines("excluded")
    assert [line["nodes"] for line in stage.lines("stuck")] == [["n2"]]
    assert attempt(stage, monkeypatch, BAD) == []
    assert stage.calls("sbatch --parsable") == [RESUBMITTED.format(stage.run)]
    assert [line["nodes"] for line in stage.lines("excluded")] == [["n2"]]


def test_and_where_that_is_refused_as_well_it_ends(stage, monkeypatch):
    stage.play("refuse", "scontrol:update", "sbatch:--parsable")
    for _ in range(3):
        attempt(stage, monkeypatch, BAD)
    monkeypatch.setattr(preflight, "check", lambda *_, **__: BAD)
    assert stage.supervise(OK) == 76


def test_too_many_left_out_earlier_are_taken_back(stage, monkeypatch):
    """The node that is bad now matters more than those that were bad once."""
    attempt(stage, monkeypatch, BAD_FIRST)
    stage.play("state", "RUNNING|None|n9,n1")
    stage.play("refuse", "sbatch:--exclude=n9,n1")
    assert attempt(stage, monkeypatch, BAD)[-1] == "scontrol update JobId=12 ExcNodeList=n9,n2"


@pytest.fixture
def asked(stage) -> Slurm:
    return Slurm(outside=stage.clock, job="12", environ=stage.environ)


@pytest.mark.parametrize("state", ["idle", "mix-", "alloc", "plnd", "idle~", "idle#", "resv"])
def test_a_node_that_is_planned_for_or_switched_off_is_up(state, stage, asked):
    write(stage.bin / "sinfo", f"#!/bin/sh\necho n2 {state}\n")
    assert asked.up(["n2"]) == {"n2"}


@pytest.mark.parametrize("state", ["idle*", "idle~*", "down", "drain", "mix$", "idle@"])
def test_a_node_that_does_not_answer_or_is_not_wanted_is_not_up(state, stage, asked):
    write(stage.bin / "sinfo", f"#!/bin/sh\necho n2 {state}\n")
    assert asked.up(["n2"]) == set()


def test_only_nodes_that_are_lacking_make_a_job_unfit(stage, asked):
    """A partition that is down for an hour is no reason to take a bad node back."""
    for words, fits in (
        ("Requested node configuration is not available", False),
        ("Required partition not available (inactive or drain)", True),
    ):
        write(stage.bin / "sbatch", f"#!/bin/sh\necho 'allocation failure: {words}' >&2; exit 1\n")
        assert asked.fits(stage.run / "job.sh", exclude=["n2"]) is fits


def test_words_that_are_not_utf8_are_read_all_the_same(stage, asked):
    write(stage.bin / "squeue", "#!/bin/sh\nprintf '12|RUNNING|\\351t\\351|n9\\n'\n")
    state = asked.state()
    assert (state.state, state.excluded) == ("RUNNING", "n9")

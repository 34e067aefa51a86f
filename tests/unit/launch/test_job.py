"""The supervisor of a job: what it does after each kind of end, with Slurm and the ranks played by stand-ins (`job_stage`)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from job_stage import ROOT, Stage, warn

from ecdit_train.config.compose import compose
from ecdit_train.errors import ConfigError, EcditError, NoProgressError
from ecdit_train.supervise import alert_file, processes
from launch import job_file, preflight, record
from launch.decide import Ending
from launch.description import describe

OK = {"all": "end=0"}


def test_a_run_that_finishes(stage, capfd):
    assert stage.supervise(OK, words=["--config-dir", "/my lab"]) == 0
    (line,) = stage.lines()
    assert (line["then"], line["code"], line["reason"]) == ("done", 0, "the run is finished")
    assert not stage.calls("scontrol requeue")
    out = capfd.readouterr().out
    for node in range(2):
        assert (
            f"node {node} n1 {20000 + 12 * 8 + 1} -m ecdit_train.cli --nproc 2 --nodes 2 resume {stage.run} --config-dir /my lab"
            in out
        )
    assert not list((stage.run / "jobs").glob("12*/"))  # what a life leaves there is gone


@pytest.mark.parametrize("code", [137, 84, 86, 88, 91, 1])
def test_what_may_have_been_bad_luck_is_tried_again_in_the_same_allocation(code, stage):
    assert stage.supervise({"all": f"commit=5 cause={code} end={code}"}, OK) == 0
    assert stage.then == ["again", "done"]
    assert stage.lines()[0]["code"] == code
    assert "rank 1: because" in stage.lines()[0]["reason"]
    assert not stage.calls("scontrol requeue")
    assert [line["life"] for line in stage.lines("life")] == [1, 2]


@pytest.mark.parametrize("code", [2, 60, 74, 77, 78, 79, 80, 85, 87, 89])
def test_what_somebody_must_look_at_ends_the_job(code, stage):
    assert stage.supervise({"all": f"cause={code} end={code}"}) == code
    assert stage.then == ["stop"]
    assert not stage.calls("scontrol requeue")


def test_the_first_cause_counts_and_not_what_killed_tasks_say(stage):
    stage.supervise({0: "cause=80 end=84", 1: "end=137"})
    assert [(line["code"], line["then"]) for line in stage.lines()] == [(80, "stop")]


@pytest.fixture
def fit(monkeypatch):
    """Nodes are taken for fit, so that many lives cost little."""
    monkeypatch.setattr(preflight, "check", lambda *_, **__: Ending(code=0))


def test_lives_without_progress_end_with_76_and_waits_grow(stage, fit):
    assert stage.supervise({"all": "end=1"}) == NoProgressError.exit_code
    assert stage.then == ["again", "again", "stop"]
    assert [line.get("wait") for line in stage.lines()] == [15.0, 60.0, None]
    assert "3 lives in a row without a newer checkpoint" in stage.lines()[-1]["reason"]
    (alert,) = alert_file.open_ones(stage.run)
    assert alert["name"] == "no-progress"
    assert "3 lives in a row without a newer checkpoint" in alert["words"]
    # Somebody has looked, and tries again: it counts from there.
    assert stage.supervise(OK) == 0


def test_progress_resets_the_count_and_costs_no_wait(stage, fit):
    bad = {"all": "end=1"}
    ranks = [bad, bad, {"all": "commit=5 end=1"}, bad, bad, OK]
    assert stage.supervise(*ranks) == 0
    assert [line.get("wait", 0.0) for line in stage.lines()] == [15.0, 60.0, 0.0, 15.0, 60.0, 0.0]


def test_lives_in_total_are_limited(stage, fit):
    ranks = [{"all": f"commit={n} end=1"} for n in range(1, 9)]
    lives = {"without_progress": 3, "total": 4, "back_off": []}
    assert stage.supervise(*ranks, lives=lives) == NoProgressError.exit_code
    assert len(stage.lines("life")) == 4


def test_lives_of_earlier_attempts_count_although_nobody_wrote_their_end(stage):
    jobs = stage.run / "jobs"
    jobs.mkdir()
    (jobs / "11.jsonl").write_text(
        '{"what": "life", "life": 1, "step": -1}\n{"what": "life", "life": 2, "step": -1}\n{"what": "resubmitted", "to": "12"}\n'
    )
    assert stage.supervise({"all": "end=1"}) == NoProgressError.exit_code
    assert [line["life"] for line in stage.lines("life")] == [3]


def test_ecdit_stop_ends_the_job_also_between_lives(stage):
    def look() -> None:
        if stage.lines():
            (stage.run / "jobs" / "12.stop").touch()

    stage.clock.at_each = look
    assert stage.supervise({"all": "end=1"}) == 75
    assert (stage.then, len(stage.lines("life"))) == (["again", "stop"], 1)
    assert "ecdit stop" in stage.lines()[-1]["reason"]

    # A cluster whose RequeueExit lists 75 starts it again, each time that it ends with that.
    stage.environ["SLURM_RESTART_COUNT"] = "1"
    assert stage.supervise(OK) == 75
    assert stage.calls("scancel") == ["scancel 12"]
    assert len(stage.lines("life")) == 1
    # Another job is not asked to stop.
    stage.environ |= {"SLURM_JOB_ID": "13", "SLURM_RESTART_COUNT": "0"}
    assert stage.supervise(OK) == 0


def test_a_requeue_that_is_refused_becomes_a_new_job(stage):
    stage.play("refuse", "scontrol")
    stage.environ |= {"SLURM_ARRAY_TASK_ID": "4", "SLURM_RESTART_COUNT": "2"}
    stage.environ["SLURM_JOB_NODELIST"] = "n1"
    stage.play("nodes", "n1")
    warn(stage, "USR2", when="life")
    assert stage.supervise({"all": "wait end=75"}, nodes=1) == 75
    assert stage.calls("sbatch") == [f"sbatch --parsable --array=4 --dependency= {stage.run}/job.sh"]
    assert stage.lines("resubmitted")[0]["to"] == "777"


def test_a_task_of_an_array_is_requeued_alone(stage):
    stage.environ |= {"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "4"}
    stage.play("state", "11|PENDING|Resources|\n12|RUNNING|None|n9")
    warn(stage, "USR2", when="life")
    assert stage.supervise({"all": "wait end=75"}) == 75
    assert asked(stage) == ["scontrol requeue 12_4"]


def test_when_nothing_brings_it_back_it_says_how(stage, capfd):
    stage.play("refuse", "scontrol", "sbatch")
    stage.environ["SLURM_JOB_NODELIST"] = "n1"
    stage.play("nodes", "n1")
    warn(stage, "USR2", when="life")
    assert stage.supervise({"all": "wait end=75"}, nodes=1) == 75
    err = capfd.readouterr().err
    assert "Operation not permitted" in err
    assert f"run: sbatch {stage.run}/job.sh" in err


def test_a_step_that_is_not_launched_is_tried_again(stage):
    stage.play("refuse", "srun")
    stage.clock.at_each = lambda: stage.play("refuse") if stage.lines() else None
    assert stage.supervise(OK) == 0
    first = stage.lines()[0]
    assert (first["then"], first["code"], first["wait"]) == ("again", 233, 15.0)
    assert "not launched" in first["reason"]


def asked(stage: Stage) -> list[str]:
    """What Slurm was told about the job."""
    return [call for call in stage.calls("scontrol") if "scontrol show" not in call]


def test_a_node_that_is_lost_in_a_life_does_not_hold_the_others(stage):
    """Its ranks say nothing more, the others have lost a peer; the step is ended, the node asked, the job goes on without it."""
    stage.play("state", "RUNNING|None|n9")
    stage.clock.at_each = lambda: stage.play("dead", "n2") if stage.lines("life") else None
    assert stage.supervise({0: "commit=3 end=84", 1: "sleep"}) == 75
    assert stage.then == ["again", "requeue"]
    assert stage.lines()[-1]["lost"] == ["n2"]
    assert asked(stage) == [
        "scontrol update JobId=12 NodeList=n1",  # as it is it would wait for the node that is gone
        "scontrol requeue 12",
        "scontrol update JobId=12 NumNodes=2 ExcNodeList=n9,n2",
    ]
    assert stage.calls("sbatch") == [f"sbatch --test-only --dependency= --exclude=n9,n2 {stage.run}/job.sh"]
    assert not stage.lines("resubmitted")


def test_a_lost_node_is_set_down_where_that_is_wanted_and_allowed(stage):
    stage.play("dead", "n2")
    assert stage.supervise(OK, bad_node="drain") == 75
    assert stage.calls("scontrol update NodeName=n2 State=down")
    assert not stage.calls("scontrol requeue")
    assert not stage.calls("sbatch")


def test_when_no_node_answers_no_node_is_blamed(stage):
    stage.play("dead", "n1", "n2")
    assert stage.supervise(OK) == NoProgressError.exit_code
    assert stage.then == ["again", "again", "stop"]
    assert "no node runs a program" in stage.lines()[0]["reason"]
    assert not stage.calls("scontrol update")


def checks(stage: Stage, **changed: object) -> dict[str, object]:
    return json.loads(stage.job().read_text())["preflight"] | changed


def test_a_bad_node_is_named_and_excluded(stage):
    """n2's clock is wrong: its task runs with a time of its own."""
    real = (stage.bin / "python").read_text()
    task = "import sys, time; now = time.time; time.time = lambda: now() + 90; from launch import preflight_task as p; "
    task += "p.main(sys.argv[-1:])"
    lie = f'if os.environ["SLURMD_NODENAME"] == "n2": sys.argv[1:3] = ["-c", {task!r}]\n    '
    (stage.bin / "python").write_text(real.replace("    os.execv", f"    {lie}os.execv"))
    assert stage.supervise(OK, preflight=checks(stage, clock_seconds=5.0)) == 75
    (line,) = stage.lines()
    assert line["then"] == "requeue"
    assert line["bad"].keys() == {"n2"}
    assert "its clock differs by +9" in line["bad"]["n2"]
    assert asked(stage) == ["scontrol requeue 12", "scontrol update JobId=12 ExcNodeList=n2"]
    assert not stage.lines("life")


def test_a_disk_that_is_full_everywhere_is_nobodys_fault(stage):
    assert stage.supervise(OK, preflight=checks(stage, free_bytes=10**18)) == 87
    assert "on every node" in stage.lines()[0]["reason"]
    assert stage.then == ["stop"]


def test_the_lead_that_a_stop_needs_is_measured(stage, capfd):
    (stage.run / "metrics").mkdir()
    rows = [{"step": 1, "perf/step_s": 20.0}, {"step": 2, "perf/step_s": 4.0, "ckpt/save_s": 45.5}]
    (stage.run / "metrics" / "0001.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert stage.supervise(OK) == 0
    assert (stage.lines()[0]["lead_needed"], stage.lines()[0]["lead"]) == (95.5, 60)
    assert "set cluster.signal_lead=100" in capfd.readouterr().err


def test_the_snapshot_of_the_code_is_what_runs(stage, capfd):
    real = (stage.bin / "python").read_text()
    (stage.bin / "python").write_text(
        real.replace('"MASTER_PORT"],', '"MASTER_PORT"], os.environ["PYTHONPATH"], os.environ["PYTHONSAFEPATH"],')
    )
    assert stage.supervise(OK, code=str(ROOT / "x")) == 0
    assert f"{ROOT}/x:{ROOT} 1" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON"),
        ("[]", "not a job file of format 1"),
        ('{"format": 2}', "not a job file of format 1"),
        ('{"format": 1, "nodes": "2"}', r"run = None: is missing.*nodes = '2': must be int"),
    ],
)
def test_a_damaged_job_file_is_one_typed_error(text, said, stage):
    path = stage.job()
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        job_file.read(path)


def test_every_damaged_key_is_named(stage):
    path = stage.job(nodes=0, lives={"without_progress": 3, "total": 0, "back_off": []}, bad_node="burn")
    with pytest.raises(
        ConfigError, match=r"nodes = 0.*lives.total = 0.*bad_node = 'burn': must be one of exclude, drain, keep"
    ):
        job_file.read(path)
    with pytest.raises(ConfigError, match=r"lives.back_off.*must be a list.*surplus = 1: is not a key"):
        job_file.read(stage.job(lives={"without_progress": 3, "total": 1, "back_off": "x"}, surplus=1))
    with pytest.raises(ConfigError, match="cannot be read"):
        job_file.read(path.with_name("none"))


def test_outside_of_a_job_or_on_other_nodes_it_refuses(stage):
    stage.environ["SLURM_JOB_NODELIST"] = "n1"
    with pytest.raises(EcditError, match="is about 2 nodes, and job 12 has 1"):
        stage.supervise(OK)
    del stage.environ["SLURM_JOB_ID"]
    with pytest.raises(EcditError, match="sbatch"):
        stage.supervise(OK)


def test_a_list_of_nodes_that_nobody_can_read_is_one_clear_error(stage):
    stage.play("nodes", "")
    stage.environ |= {"SLURM_JOB_NODELIST": "n[1-x]", "SLURM_RESTART_COUNT": "1"}
    with pytest.raises(EcditError, match=r"'n\[1-x\]' names no nodes"):
        stage.supervise(OK)


def test_a_job_is_known_before_it_does_anything(stage, monkeypatch):
    """To `ecdit stop` too: it may have been submitted by hand, and checks of nodes take minutes."""
    seen = []
    monkeypatch.setattr(preflight, "check", lambda *_, **__: seen.append(record.newest(stage.run)) or Ending(code=80))
    assert stage.supervise(OK) == 80
    assert seen == ["12"]
    assert [line["attempt"] for line in stage.lines("begun")] == [0]


def test_a_killed_supervisor_takes_its_ranks_along(stage):
    """The kernel ends srun, and srun its tasks."""
    (stage.run / "ranks").write_text(json.dumps([{"all": "sleep"}]))
    command = [sys.executable, "-m", "launch.job", str(stage.job())]
    process = subprocess.Popen(command, env={**os.environ, **stage.environ}, stdin=subprocess.PIPE, cwd=stage.folder)
    try:
        deadline = time.monotonic() + 60
        while len(list(Path(stage.run).glob("jobs/12/life-0001/node-*.json"))) < 2:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        children = processes.descendants(process.pid)
        assert len(children) >= 3  # srun and its two tasks
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=20)
        deadline = time.monotonic() + 20
        while any(processes.started(pid) for pid in children):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.kill()


def test_needs_neither_torch_nor_yaml_nor_hydra():
    code = "import sys, launch.job, launch.preflight_task; sys.exit(bool({'torch', 'yaml', 'hydra', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("cluster", ["local", "h100_ib400", "slurm_pyxis"])
def test_what_launch_writes_is_what_the_supervisor_reads(cluster, tmp_path):
    cfg = compose(["experiment=ec_dit_xl_8e", f"cluster={cluster}"], local=False)
    path = tmp_path / "job.json"
    path.write_text(describe(cfg, run=str(tmp_path), code="/code", cwd="/home/me", words=["a=1"]).text)
    job = job_file.read(path)
    assert (job.nodes, job.ranks_per_node) == (cfg.cluster.nodes, cfg.cluster.gpus_per_node)
    assert (job.code, job.words, job.preflight.folders[0]) == ("/code", ("a=1",), str(tmp_path))

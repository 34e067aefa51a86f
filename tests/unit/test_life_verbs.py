"""`ecdit status`, `ecdit stop`, and how many ranks `ecdit resume` starts: on folders made by hand and on a real run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_runs import configure, words

from ecdit_train import life_verbs
from ecdit_train.config.stored import freeze
from ecdit_train.errors import ConfigError, RunFolderError
from ecdit_train.supervise import alert_file, lives, summary
from ecdit_train.supervise.beats import Beat
from ecdit_train.supervise.lease import acquire, read
from ecdit_train.supervise.verdict import Seen
from launch import record


@pytest.fixture
def run(tmp_path):
    freeze(configure(tmp_path, "nowhere"), tmp_path)
    return tmp_path


def ecdit(*line: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-X", "importtime", "-m", "ecdit_train.cli", *line]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_no_run_is_refused(tmp_path):
    with pytest.raises(RunFolderError, match="not a run folder"):
        life_verbs.look(tmp_path)


def test_not_begun(run):
    found = life_verbs.look(run)
    assert (found.state, found.exit_code) == ("not begun", 0)


@pytest.mark.parametrize(
    ("code", "state"), [(0, "finished"), (75, "stopped, to be resumed"), (80, "failed"), (86, "failed")]
)
def test_the_last_life_is_the_exit_code(code, state, run):
    acquire(run, expires=60.0).release()
    lives.note(run, number=1, host="a", ranks=8, job="17")
    lives.note(run, number=1, from_step=0)
    lives.note(run, number=1, exit_code=code, why="because", step=12)
    found = life_verbs.look(run)
    assert (found.state, found.exit_code) == (state, code)
    assert found.lines[-1].endswith(f"8 ranks, a, Slurm job 17: from step 0 to 12, exit code {code}: because")


def test_alerts_that_are_on_are_one_line(run):
    told = {"step": 7, "level": "warning", "words": "ranks wait"}
    alert_file.append(run, name="slow-data", state="on", life=2, **told)
    alert_file.append(run, name="bad-samples", state="on", life=2, **told)
    alert_file.append(run, name="bad-samples", state="off", life=2, **told)
    (line,) = [line for line in life_verbs.look(run).lines if line.startswith("alerts")]
    assert line == "alerts      slow-data since step 7: ranks wait (docs/runbook)"
    alert_file.append(run, name="slow-data", state="off", life=2, **told)
    assert not [line for line in life_verbs.look(run).lines if line.startswith("alerts")]


def test_an_end_that_nobody_noted(run):
    lives.note(run, number=1, host="a", ranks=1)
    found = life_verbs.look(run)
    assert found.state.startswith("ended without a word")
    assert found.exit_code == 1


def test_the_first_reason_is_the_cause(run):
    lives.note(run, number=1, exit_code=86, why="rank 3 was silent")
    lives.note(run, number=1, exit_code=84, why="PeerLostError")
    (life,) = lives.read(run)
    assert (life.facts["exit_code"], life.facts["why"]) == (86, "rank 3 was silent")


def test_a_silent_rank_is_named(run):
    held = acquire(run, expires=60.0)
    lives.note(run, number=held.epoch, host="a", ranks=2)
    ranks = [
        Seen(
            beat=Beat(
                rank=n, pid=1, started=1, phase="data", step=4, counter=9, seconds=20.0 * n, allowed=5.0, spent={}
            ),
            state="sleeping",
            host="",
        )
        for n in range(2)
    ]
    summary.publish(run, life=held.epoch, ranks=ranks)
    found = life_verbs.look(run)
    assert (found.state, found.exit_code) == ("running, but rank 1 is silent in data of step 4", 86)
    held.release()


def test_status_of_a_finished_run_needs_no_torch(tiny_shards, tmp_path):
    assert ecdit("train", *words(tmp_path, tiny_shards, "train.steps=4")).returncode == 0
    said = ecdit("status", str(tmp_path))
    assert said.returncode == 0
    assert " torch\n" not in said.stderr
    lines = dict(line.split(maxsplit=1) for line in said.stdout.splitlines() if not line.startswith("life"))
    assert lines["step"] == "4 of 4 (100.0 %)"
    assert lines["training"].startswith("loss ")
    assert lines["checkpoint"].startswith("step 4, committed ")


def test_stop_asks_the_owner_and_tells_what_came_of_it(run, capsys):
    held = acquire(run, expires=0.2)

    def owner() -> None:
        lives.note(run, number=held.epoch, exit_code=75, why="stopped by ecdit stop, everything saved", step=9)
        threading.Thread(target=held.release).start()

    held.on_stop = owner
    assert life_verbs.stop(life_verbs.argparse.Namespace(run=str(run), timeout=20.0)) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith(f"asked process {os.getpid()}")
    assert out[1] == "stopped by ecdit stop, everything saved: step 9"
    assert life_verbs.stop(life_verbs.argparse.Namespace(run=str(run), timeout=1.0)) == 0
    assert "nothing runs there" in capsys.readouterr().out


def test_stop_tells_when_it_takes_longer(run, capsys):
    held = acquire(run, expires=60.0)
    assert life_verbs.stop(life_verbs.argparse.Namespace(run=str(run), timeout=0.5)) == 75
    assert "not stopped within 0.5 s" in capsys.readouterr().err
    held.release()


def test_as_many_ranks_as_it_was_trained_on(run, monkeypatch):
    assert life_verbs.ranks_for(run) == 1
    lives.note(run, number=1, ranks=2)
    lives.note(run, number=1, from_step=0)
    lives.note(run, number=2, ranks=8)  # never began to train
    monkeypatch.setattr(life_verbs.os, "cpu_count", lambda: 4)
    assert life_verbs.ranks_for(run) == 2
    lives.note(run, number=2, from_step=10)
    with pytest.raises(
        ConfigError, match=r"--nproc = 8: .* trained on 8 ranks, and this machine has 4 cores: say how many"
    ):
        life_verbs.ranks_for(run)


def test_a_run_without_lives_gets_what_its_layout_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(life_verbs.os, "cpu_count", lambda: 64)
    config = configure(tmp_path, "nowhere")
    for words_, ranks in (({"tp": 2, "ep": 4}, 4), ({"tp": 2, "dp_shard": 3}, 6), ({"dp_replicate": 2}, 2)):
        freeze(replace(config, parallel=replace(config.parallel, **words_)), tmp_path)
        assert life_verbs.ranks_for(tmp_path) == ranks


def test_a_real_run_is_refused_twice_watched_and_stopped(tiny_shards, tmp_path):
    line = words(tmp_path / "run", tiny_shards, "train.steps=100000", "optim.schedule=constant")
    command = [sys.executable, "-m", "ecdit_train.cli", "train", *line]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 60
        while not metrics.exists():
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        second = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert second.returncode == 85
        assert f"is owned by process {process.pid} on " in second.stderr
        found = ecdit("status", str(tmp_path / "run"))
        assert found.returncode == 0
        assert "state       running" in found.stdout
        assert ecdit("stop", str(tmp_path / "run")).returncode == 0
        assert process.wait(timeout=60) == 75
    finally:
        process.kill()
    steps = [json.loads(text)["step"] for text in metrics.read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))
    assert read(Path(tmp_path / "run")).mark.token is None
    assert lives.read(tmp_path / "run")[-1].facts["why"] == "stopped by ecdit stop, everything saved"


@pytest.fixture
def job(run, tmp_path_factory, monkeypatch):
    """`job(state)`: Slurm has job 12 of this run like that, which has decided something."""

    def say(state: str, *, scancel: str = "rm {}/state") -> None:
        folder = tmp_path_factory.mktemp("bin")
        (folder / "state").write_text(state)
        (folder / "squeue").write_text(f"#!/bin/sh\n[ $3 = 12 ] && sed 's/^/12|/' {folder}/state\n")
        (folder / "scancel").write_text(f'#!/bin/sh\necho "$*" > {run}/cancelled; {scancel.format(folder)}\n')
        for name in ("squeue", "scancel"):
            (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    record.add(run, "12", what="life", life=1, step=-1)
    facts = {"then": "again", "reason": "a process was killed", "step": 60, "wait": 15.0, "lost": ["n2"]}
    record.add(run, "12", what="decision", life=1, **facts)
    return say


def test_status_tells_what_the_job_does_and_decided(run, job):
    job("PENDING|Priority|n2")
    lines = life_verbs.look(run).lines
    assert "job         12: PENDING (Priority)" in lines
    (told,) = [line for line in lines if line.startswith("decided")]
    assert told.endswith("life 1, step 60: a process was killed; bad nodes: n2: again in 15 s")
    record.add(run, "12", what="resubmitted", to="13")
    assert "job         13: not in the queue" in life_verbs.look(run).lines


def ask_to_stop(run) -> int:
    return life_verbs.stop(life_verbs.argparse.Namespace(run=str(run), timeout=1.0))


def test_stop_of_a_job_that_waits_takes_it_out(run, job, capsys):
    job("PENDING|Priority|")
    assert ask_to_stop(run) == 0
    assert capsys.readouterr().out == "job 12 waited in the queue (Priority); it is cancelled\n"
    assert (run / "cancelled").read_text() == "--state=PENDING 12\n"
    assert not record.stop_path(run, "12").exists()


def test_stop_of_a_job_that_cannot_be_taken_out(run, job, capsys):
    job("PENDING|Priority|", scancel="exit 1")
    assert ask_to_stop(run) == 75
    assert "still waits in the queue: scancel 12" in capsys.readouterr().err
    assert not record.stop_path(run, "12").exists(), "it may come back another day"


def test_stop_of_a_job_that_starts_meanwhile(run, job, capsys):
    """scancel leaves it alone, and its supervisor is told."""
    job("PENDING|Priority|", scancel="echo 'RUNNING|None|' > {}/state")
    assert ask_to_stop(run) == 0
    assert "it will start no further one" in capsys.readouterr().out
    assert record.stop_path(run, "12").exists()


def test_stop_of_a_run_takes_the_job_that_comes_after_it_out(run, job, monkeypatch, capsys):
    """Else `ecdit stop` would only make room for it."""
    job("PENDING|Dependency|")
    monkeypatch.setenv("SLURM_JOB_ID", "11")
    held = acquire(run, expires=60.0)
    assert life_verbs.stop(life_verbs.argparse.Namespace(run=str(run), timeout=0.1)) == 75
    assert "job 12 waited in the queue (Dependency); it is cancelled" in capsys.readouterr().out
    held.release()


@pytest.mark.parametrize(
    ("state", "told", "code"),
    [
        ("PENDING|Resources|", "waits in the queue: job 12: PENDING (Resources)", 0),
        (
            "PENDING|DependencyNeverSatisfied|",
            "waits in the queue: job 12: PENDING (DependencyNeverSatisfied)",
            83,
        ),
        ("RUNNING|None|", "between two lives: job 12 runs", 0),
    ],
)
def test_a_job_that_is_not_at_work(state, told, code, run, job):
    """After a life that was requeued, and before the first."""
    job(state)
    lives.note(run, number=1, host="a", ranks=1, exit_code=75, why="stopped by USR2, everything saved", step=3)
    found = life_verbs.look(run)
    assert (found.state, found.exit_code, found.goes_on) == (told, code, True)


def test_a_job_that_was_only_submitted_is_found(run, job):
    job("PENDING|Priority|")
    record.path_of(run, "12").unlink()
    assert life_verbs.look(run).state == "not begun"
    record.add(run, "12", what="submitted")
    found = life_verbs.look(run)
    assert (found.state, found.exit_code) == ("waits in the queue: job 12: PENDING (Priority)", 0)


def test_goodput_counts_a_step_once(run):
    """Ten seconds of steps that count in forty: the life that was lost made two that were done again."""
    (run / "metrics").mkdir()
    first = [{"step": n, "time": 100.0 + n, "perf/step_s": 1.0} for n in range(1, 7)]
    again = [{"life": 2, "after": 4, "time": 130.0}]
    again += [{"step": n, "time": 130.0 + n, "perf/step_s": 1.0} for n in range(5, 11)]
    for name, lines in (("0001", first), ("0002", again)):
        (run / "metrics" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for number, facts in ((1, {}), (2, {"exit_code": 0, "step": 10})):
        lives.note(run, number=number, host="a", ranks=1, **facts)
    for number, at in ((1, 100.0), (2, 140.0)):
        path = lives.path_of(run, number=number)
        path.write_text(json.dumps(json.loads(path.read_text()) | {"time": at}) + "\n")
    (told,) = [line for line in life_verbs.look(run).lines if line.startswith("goodput")]
    assert told.startswith("goodput     25.0% of the 40 s since it began")


def test_the_slowest_rank_is_the_one_whose_own_work_takes_longest(run):
    """The others wait for it in the exchange: what they are in says nothing."""
    held = acquire(run, expires=60.0)
    lives.note(run, number=held.epoch, host="a", ranks=3)
    ranks = []
    for n in range(3):
        spent = {"forward": 0.4 if n == 1 else 0.1, "exchange": 0.1 if n == 1 else 0.4}
        where = {"phase": "exchange", "step": 4, "counter": 9 - (n == 2), "seconds": 0.1, "allowed": 5.0}
        ranks.append(Seen(beat=Beat(rank=n, pid=1, started=1, spent=spent, **where), state="sleeping", host=""))
    summary.publish(run, life=held.epoch, ranks=ranks)
    (told,) = [line for line in life_verbs.look(run).lines if line.startswith("ranks")]
    assert "3 alive; last rank 2 on " in told
    assert "; slowest rank 1 on " in told
    assert told.endswith(": 0.4 s a step by itself (median 0.1 s)")
    held.release()


def test_watch_goes_on_while_a_job_waits(run, job, monkeypatch, capsys):
    job("PENDING|Priority|")
    monkeypatch.setattr(life_verbs.time, "sleep", lambda _: job("|") if "PENDING" in capsys.readouterr().out else None)
    assert life_verbs.status(life_verbs.argparse.Namespace(run=str(run), watch=1.0)) == 0
    assert "state       not begun" in capsys.readouterr().out


def test_stop_of_a_job_between_two_lives_tells_its_supervisor(run, job, capsys):
    job("RUNNING|None|")
    assert life_verbs.stop(life_verbs.argparse.Namespace(run=str(run), timeout=1.0)) == 0
    assert "between two lives" in capsys.readouterr().out
    assert record.stop_path(run, "12").exists()


def test_stop_of_a_life_of_a_job_tells_its_supervisor_too(run, job, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    held = acquire(run, expires=60.0)
    assert life_verbs.stop(life_verbs.argparse.Namespace(run=str(run), timeout=0.1)) == 75
    assert record.stop_path(run, "12").exists()
    held.release()


def test_stop_of_a_job_that_goes_on_under_another_number(run, job, capsys):
    """It makes its first checks, and has written nothing itself."""
    record.add(run, "11", what="resubmitted", to="12", exclude=[])
    record.path_of(run, "12").unlink()
    job("RUNNING|None|")
    assert ask_to_stop(run) == 0
    assert "job 12 is between two lives; it will start no further one" in capsys.readouterr().out
    assert record.stop_path(run, "12").exists()


def test_stop_of_a_life_whose_job_has_written_nothing(run, monkeypatch):
    """`sbatch RUN/job.sh` by hand, whose supervisor could not write either: it is told all the same."""
    monkeypatch.setenv("SLURM_JOB_ID", "15")
    held = acquire(run, expires=60.0)
    assert ask_to_stop(run) == 75
    assert record.stop_path(run, "15").exists()
    held.release()


def test_a_life_says_on_how_many_hosts_it_was(run):
    """As the supervisor noted before it; without one, only the first is known."""
    for number, (nodes, job) in enumerate(
        ((("n1", "n2"), "12"), (("n1",), "12"), (("n1", "n2", "n3"), "12"), ((), "7")), 1
    ):
        if nodes:
            record.add(run, job, what="life", life=number, step=-1, nodes=list(nodes))
        time.sleep(0.01)
        lives.note(run, number=number, host="n1", ranks=2, job=job, from_step=0)
        time.sleep(0.01)
    told = [line for line in life_verbs.look(run).lines if line.startswith("life")]
    where = [line.partition("2 ranks, ")[2].partition(":")[0] for line in told]
    many = [f"n1{more}, Slurm job 12" for more in (" and 1 more host", "", " and 2 more hosts")]
    assert where == [*many, "n1, Slurm job 7"]

"""`ecdit logs`: which log, and how much of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from ecdit_train import log_verb
from ecdit_train.errors import RunFolderError


@pytest.fixture
def run(tmp_path):
    (tmp_path / "resolved.yaml").touch()
    (tmp_path / "logs").mkdir()
    for number, age in ((4711, 100), (4712, 10)):
        path = tmp_path / "logs" / f"a-{number}.out"
        path.write_text("".join(f"{number} line {n}\n" for n in range(30_000)))
        os.utime(path, (time.time() - age,) * 2)
    return tmp_path


def told(*line: str) -> str:
    command = [sys.executable, "-m", "ecdit_train.cli", "logs", *line]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_the_end_of_the_newest_log(run):
    assert told(str(run), "--lines", "2") == "4712 line 29998\n4712 line 29999\n"
    assert told(str(run), "--job", "4711", "--lines", "1") == "4711 line 29999\n"


@pytest.mark.parametrize("lines", [0, 1, 7000, 30_000, 40_000])
def test_so_many_lines(lines, run):
    with log_verb.find(run).open("rb") as log:
        text = log_verb.tail(log, lines=lines)
        assert log.read() == b""
    assert text.count(b"\n") == min(lines, 30_000)
    assert not lines or text.endswith(b"line 29999\n")


def test_without_a_log_it_says_what_there_is(run, tmp_path_factory):
    with pytest.raises(RunFolderError, match="no log of a job 9; there are those of 4711, 4712"):
        log_verb.find(run, job="9")
    with pytest.raises(RunFolderError, match="is not a run folder"):
        log_verb.find(tmp_path_factory.mktemp("empty"))


def test_following(run):
    command = [sys.executable, "-m", "ecdit_train.cli", "logs", str(run), "--lines", "1", "--follow"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "4712 line 29999\n"
        with (run / "logs" / "a-4712.out").open("a") as log:
            log.write("more\n")
        assert process.stdout.readline() == "more\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.stdout.close()

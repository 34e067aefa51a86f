"""The README's commands, run as they stand. Training is cut to a few steps of a tiny network by words at the end."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import WORDS

README = Path(__file__).parents[2] / "README.md"
COMMANDS = [line.split("#")[0].strip() for line in README.read_text().splitlines() if re.match(r" {4}ecdit ", line)]
SHORT = [w for w in WORDS if not w.startswith(("experiment=", "model.width=", "model.heads="))]
"""The experiment is the README's, and so are its two heads: one could not be split."""


def run(words: list[str], *, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "ecdit_train.cli", *words]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=240, check=False)


def test_the_readme_has_commands():
    assert len(COMMANDS) >= 6
    assert {shlex.split(c)[1] for c in COMMANDS} >= {"train", "plan", "launch"}


def test_no_placeholder_is_left():
    assert not re.search(r"\b[A-Z]+_RESULT\b|\bMEASURED\b|TODO", README.read_text())


def test_training_commands_in_order(tmp_path):
    """What the README lines up: shards, a run alone, on two ranks, and with tensor parallelism."""
    ran = []
    for command in COMMANDS:
        words = shlex.split(command)[1:]
        if "train" in words:
            words += SHORT
        elif "resume" in words:
            words += ["train.steps=14"]
        elif "data" not in words:
            continue
        done = run(words, cwd=tmp_path)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        ran.append(command)
    assert len(ran) >= 4


@pytest.mark.parametrize("command", [c for c in COMMANDS if not re.search(r"\b(train|resume|data shapes)\b", c)])
def test_commands_that_cost_nothing(command, tmp_path):
    done = run(shlex.split(command)[1:], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 500
    assert not list(tmp_path.iterdir()), "a command that only looks left something behind"

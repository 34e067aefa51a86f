"""CONTRIBUTING's "add a router" walk, as it stands there: one file and one YAML, trained on one rank and on
two with divided experts."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from dist_harness import run_distributed
from dist_runs import Layout
from dist_training import curves

PAGE = Path(__file__).parents[2] / "CONTRIBUTING.md"


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Path:
    """The files that the page names, each with the block below its name."""
    folder = tmp_path_factory.mktemp("walk")
    found = re.findall(r"`(mylab/[\w./]+)`[^`]*```\w+\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert [name for name, _ in found] == ["mylab/sure_router.py", "mylab/moe/router/sure.yaml"], "one file, one YAML"
    for name, text in found:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_trained_alike_on_one_rank_and_on_two(lab, tmp_path, tiny_shards):
    words = (
        "moe/router=sure",
        "train.steps=6",
        "train.global_batch=8",
        "train.microbatch=2",
        f"--config-dir={lab}/mylab",
    )
    one = run_distributed(1, curves, tmp_path, tiny_shards, {"one": Layout(world=1)}, words, timeout=120)[0]["one"]
    pair = {"ep2": Layout(world=2, words=("parallel.ep=2",))}
    two = run_distributed(2, curves, tmp_path, tiny_shards, pair, words, timeout=120)[0]["ep2"]
    assert two.losses == pytest.approx(one.losses, rel=2e-5)
    assert two.norms == pytest.approx(one.norms, rel=2e-4)


@pytest.mark.parametrize("verb", ["slots", "plan"])
def test_its_commands_work(lab, verb):
    (command,) = re.findall(rf"^    ecdit ({verb} .*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    answer = subprocess.run(
        [sys.executable, "-P", "-m", "ecdit_train.cli", *command.split()],
        cwd=lab,
        text=True,
        capture_output=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    assert "sure" in answer.stdout.lower() if verb == "slots" else "shapes_tiny" in answer.stdout

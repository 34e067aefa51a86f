"""A folder outside the package fills router, experts, encoder, sampler, stages of data and cluster: composed,
planned, trained, saved, resumed on another layout, drawn and reported, without an edit in the package.
`tests/open_slots/lab` is that folder."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from dist_harness import run_distributed
from dist_runs import Layout
from dist_training import curves, resumed_elsewhere
from tiny_runs import records

LAB = Path(__file__).parents[1] / "open_slots" / "lab"
STEPS = 10
LAB_RUN = ("moe/router=corrected", "moe/experts=gated", "encoders/text=letters", "encoders.text.width=32",
           "encoders.text.max_tokens=8", "sample/sampler=midpoint", "data/stages=mirrored", "cluster=desk",
           f"--config-dir={LAB}")  # fmt: skip
RUN = (*LAB_RUN, f"train.steps={STEPS}", "train.global_batch=8", "train.microbatch=2", "optim.warmup_steps=4",
       "checkpoint.every_steps=5", "observe.log_every=5")  # fmt: skip
ONE = {"one": Layout(world=1)}
FOUR = {
    "dp4": Layout(world=4),
    "tp2": Layout(world=4, words=("parallel.tp=2",)),
    "ep4": Layout(world=4, words=("parallel.ep=4",)),
    "tp2_ep4": Layout(world=4, words=("parallel.tp=2", "parallel.ep=4")),
}
BUFFER = "buffer/blocks.1.feed_forward.router.usual"


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_shards):
    """The same ten steps on one rank and on four layouts of four."""
    folder = tmp_path_factory.mktemp("lab-runs")
    lives = run_distributed(1, curves, folder, tiny_shards, ONE, RUN, timeout=200)[0]
    lives |= run_distributed(4, curves, folder, tiny_shards, FOUR, RUN, timeout=300)[0]
    return folder, lives


def ecdit(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "ecdit_train.cli", *words], cwd=cwd, text=True, capture_output=True, check=False
    )


def test_equal_on_every_layout(runs):
    _, lives = runs
    one = lives["one"]
    assert one.losses[-1] != one.losses[0]
    for name, life in lives.items():
        assert life.finished
        assert life.losses == pytest.approx(one.losses, rel=2e-5), name
        assert life.norms == pytest.approx(one.norms, rel=2e-4), name


def test_own_loss_and_buffer_are_logged_and_move(runs):
    folder, _ = runs
    logged = {name: records(folder / name) for name in ("one", "tp2_ep4")}
    for lines in logged.values():
        assert all(line["train/spread_loss"] > 0 for line in lines)
        assert lines[-1]["moe/L2/usual_max"] != 0.5
    for a, b in zip(*logged.values(), strict=True):
        assert a["train/spread_loss"] == pytest.approx(b["train/spread_loss"], rel=1e-4)
        assert a["moe/L2/usual_max"] == pytest.approx(b["moe/L2/usual_max"], rel=1e-5)


def test_buffer_and_everything_else_survive_another_layout(runs, tiny_shards):
    """Saved on 4 ranks with tp 2 and ep 4, loaded on 4 with dp alone, and on one: the same bits."""
    folder, lives = runs
    saved = lives["tp2_ep4"].tensors
    assert BUFFER in saved
    layouts = {"dp4": FOUR["dp4"], "ep4": FOUR["ep4"]}
    loaded = run_distributed(4, resumed_elsewhere, folder / "tp2_ep4", tiny_shards, layouts, RUN, timeout=200)[0]
    loaded |= run_distributed(1, resumed_elsewhere, folder / "tp2_ep4", tiny_shards, ONE, RUN, timeout=200)[0]
    for name, digests in loaded.items():
        assert digests == saved, name


def test_misspelt_keys_are_answered(tmp_path):
    lab = ("--config-dir", str(LAB), "experiment=toy")
    answer = ecdit(
        "config", "show", *lab, "moe.router.spred_weight=1", "moe/experts=gatde", "moe.router.momentum=2", cwd=tmp_path
    )
    assert answer.returncode == 77
    said = answer.stderr
    assert "moe.router.spred_weight = 1: unknown key; nearest valid: moe.router.spread_weight" in said
    assert (
        "moe/experts = 'gatde': unknown choice of moe/experts; there are gated, gelu, swiglu; nearest valid: gated"
        in said
    )
    assert "moe.router.momentum = 2.0: must be at least 0 and below 1" in said


def test_listed_with_its_keys(tmp_path):
    said = ecdit("slots", "--config-dir", str(LAB), cwd=tmp_path).stdout
    for words in (
        "corrected",
        "toy_router.Corrected",
        "spread_weight = 0.1: a number. Weight of the loss",
        "gated",
        "letters",
        "midpoint",
        "mirrored",
        "toy_stages.Mirrored",
    ):
        assert words in said
    assert "corrected" not in ecdit("slots", cwd=tmp_path).stdout


def test_planned_and_held_against_a_dry_run(tmp_path):
    """Three matrices per expert, their FLOPs and what they keep come from the class itself."""
    words = ("--config-dir", str(LAB), "experiment=toy", "train.microbatch=32", "parallel.tp=2", "parallel.ep=4")
    answer = ecdit("plan", *words, "--dry-run", "--json", cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr + answer.stdout
    document = json.loads(answer.stdout)
    assert document["parameters"]["by_part"]["experts"] == 2 * 8 * 3 * 128 * (2 * 512 // 3)
    assert document["parameters"]["by_part"]["router"] == 2 * (128 * 8 + 8)
    tokens = 128 * 18
    assert document["flops"]["by_part"]["experts"] == 3 * 2 * tokens * 2 * 6 * 128 * (2 * 512 // 3)
    assert all(d["within"] for d in document["differences"])


def test_drawn_reported_and_resumed_by_command(runs, tiny_shards, tmp_path):
    """The run folder remembers where its modules are."""
    folder, _ = runs
    run = folder / "one"
    drawn = ecdit(
        "sample",
        f"run={run}",
        "prompts=[a red circle, a blue square]",
        "sample.steps=3",
        f"out={tmp_path}/grid.png",
        cwd=tmp_path,
    )
    assert drawn.returncode == 0, drawn.stderr
    assert (tmp_path / "grid.png").stat().st_size > 1000
    assert ecdit("report", str(run), cwd=tmp_path).returncode == 0
    assert "Corrected" in (run / "report.html").read_text(encoding="utf-8")
    again = ecdit("resume", str(run), f"train.steps={STEPS + 2}", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert records(run)[-1]["step"] == STEPS + 2


def test_the_cluster_of_three_lines_renders_a_job(tmp_path, tiny_shards):
    words = (
        "--config-dir",
        str(LAB),
        "experiment=toy",
        "train.microbatch=32",
        f"data.shards={tiny_shards}",
        "--render-only",
    )
    answer = ecdit("launch", *words, cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert '"ranks_per_node": 4' in answer.stdout
    assert '"--config-dir"' in answer.stdout
    assert re.search(r'"\S+/runs/toy/code/[0-9a-f]{12}/config_dir"', answer.stdout), (
        "the copy of the folder is what runs"
    )
    assert not list(tmp_path.iterdir())

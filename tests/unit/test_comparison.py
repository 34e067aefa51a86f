"""Final losses over seeds, and what tells runs apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ecdit_train.comparison import LAST_RECORDS, final_loss, named, table, text
from ecdit_train.config.compose import compose
from ecdit_train.config.stored import freeze
from ecdit_train.errors import RunFolderError


def log(run: Path, losses: list[float | None], *, tail: str = "") -> Path:
    run.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"step": n, "train/loss": loss}) for n, loss in enumerate(losses, 1)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n" + tail)
    return run


def test_the_loss_is_the_mean_of_the_last_records(tmp_path):
    losses = [9.0] * 4 + [1.0, 2.0, 3.0, 4.0, 5.0]
    final = final_loss(log(tmp_path, losses))
    assert LAST_RECORDS == 5
    assert (final.step, final.loss) == (9, 3.0)


def test_records_without_a_loss_and_a_cut_line(tmp_path):
    final = final_loss(log(tmp_path, [2.0, None, 4.0], tail='{"step": 4, "train/lo'))
    assert (final.step, final.loss) == (3, 3.0)
    assert final_loss(tmp_path / "none") is None
    assert final_loss(log(tmp_path / "empty", [])) is None


def test_mean_and_sample_deviation(tmp_path):
    runs = [("a", log(tmp_path / "1", [1.0])), ("a", log(tmp_path / "2", [3.0])), ("b", log(tmp_path / "3", [5.0, 5.0])),
            ("a", tmp_path / "crashed")]  # fmt: skip
    a, b = table(runs)
    assert (a.combination, a.seeds, a.runs, a.mean, a.step) == ("a", 2, 3, 2.0, 1)
    assert a.spread == pytest.approx(2**0.5)
    assert (b.seeds, b.mean, b.spread, b.step) == (1, 5.0, None, 2)
    shown = text([a, b]).splitlines()
    assert shown[1].split() == ["a", "2", "of", "3", "1", "2.00000", "1.41421"]
    assert shown[2].split() == ["b", "1", "2", "5.00000", "-"]


def test_runs_are_told_apart_by_what_differs(tmp_path):
    for name, words in {"d1": ["moe=dense"], "d2": ["moe=dense", "train.seed=2"], "t": ["moe=token_choice"]}.items():
        freeze(compose([*words, f"run=runs/{name}"], local=False), tmp_path / name)
    labels = [label for label, _ in named([str(tmp_path / n) for n in ("d1", "d2", "t")])]
    assert labels[0] == labels[1] != labels[2]
    assert "seed" not in labels[0]
    assert "moe.num_experts=1" in labels[0]
    assert "moe.router._target_=ecdit_train.model.routers.token_choice.TokenChoice" in labels[2]
    assert "top_k" not in labels[2]  # follows from the class


def test_a_sweep_folder(tmp_path):
    jobs = [{"words": ["moe=dense", f"train.seed={n}"], "run": f"r{n}"} for n in (1, 2)]
    (tmp_path / "sweep.json").write_text(json.dumps({"jobs": jobs}))
    assert named([str(tmp_path)]) == [("moe=dense", tmp_path / "r1"), ("moe=dense", tmp_path / "r2")]


@pytest.mark.parametrize("content", [None, "{", '{"jobs": [{}]}'])
def test_neither_a_run_nor_a_sweep(content, tmp_path):
    if content is not None:
        (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(RunFolderError, match="neither a run folder" if content is None else "cannot be read"):
        named([str(tmp_path)])

"""Final losses over seeds, and what tells runs apart."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from cli_commands import ecdit

from ecdit_train.comparison import LAST_RECORDS, final_loss, named, table, text
from ecdit_train.config.compose import compose
from ecdit_train.config.stored import freeze
from ecdit_train.errors import RunFolderError
from ecdit_train.observe.diverging import parting


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


# --- one by one ------------------------------------------------------------------------------------------------------


def entries(**metrics: list[float | None]) -> list[dict]:
    """Records of steps 1, 2, ... with these values, as far as each list goes."""
    length = max(map(len, metrics.values()))
    return [{"step": n + 1} | {k: v[n] for k, v in metrics.items() if n < len(v)} for n in range(length)]


def test_where_two_logs_part():
    loss, norm = [3.0, 2.0, 1.0, 0.5], [1.0, 1.0, 1.0, 1.0]
    one = entries(**{"train/loss": loss, "optim/grad_norm": norm, "perf/step_s": [0.1] * 4})
    same = parting(one, entries(**{"train/loss": loss, "optim/grad_norm": norm, "perf/step_s": [0.2] * 4}))
    assert (same.steps, same.last, same.apart, same.loss) == (4, 4, None, None)
    assert same.text() == "no difference in 4 steps that both have logged, up to step 4"
    at_loss = parting(one, entries(**{"train/loss": [3.0, 2.0, 1.25], "optim/grad_norm": [1.0, 1.0, 1.5]}))
    assert (at_loss.apart.step, at_loss.apart.metric, at_loss.apart.one, at_loss.apart.other) == (
        3,
        "train/loss",
        1.0,
        1.25,
    )
    assert at_loss.apart.also == ("optim/grad_norm",)
    assert (at_loss.steps, at_loss.loss) == (3, None)
    earlier = parting(one, entries(**{"train/loss": [3.0, 2.0, 9.0, 0.5], "optim/grad_norm": [1.0, 2.0, 1.0, 1.0]}))
    assert (earlier.apart.step, earlier.apart.metric, earlier.loss.step) == (2, "optim/grad_norm", 3)
    assert "train/loss from step 3" in earlier.text()


def test_a_tolerance_is_relative_and_what_is_not_finite_differs():
    one = entries(**{"train/loss": [100.0, 0.001]})
    near = entries(**{"train/loss": [100.5, 0.001]})
    assert parting(one, near).apart.step == 1
    assert parting(one, near, tolerance=0.01).apart is None
    small = entries(**{"train/loss": [100.0, 0.0015]})
    assert parting(one, small, tolerance=0.01).apart.step == 2
    broken = parting(one, entries(**{"train/loss": [100.0, None]}), tolerance=0.5)
    assert (broken.apart.step, broken.apart.other) == (2, None)
    assert "not finite" in broken.text()
    assert parting(entries(**{"train/loss": [None]}), entries(**{"train/loss": [None]})).apart is None
    assert parting(one, [{"step": 7, "train/loss": 1.0}]).text() == "no step that both have logged"
    assert parting(one, []).steps == 0


@pytest.fixture
def two(tmp_path, monkeypatch):
    """Runs a and b: another seed, another loss from step 3 on, b still on its way, a alone with a metric."""
    monkeypatch.chdir(tmp_path)
    for name, seed, losses in (("a", 1, [3.0, 2.0, 1.0, 0.5, 0.25, 0.125]), ("b", 2, [3.0, 2.0, 1.5])):
        freeze(
            compose([f"run=runs/{name}", f"train.seed={seed}", "train.steps=6"], local=False), tmp_path / "runs" / name
        )
        log(tmp_path / "runs" / name, losses)
    with (tmp_path / "runs/a/metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "eval/loss": 1.0}\n')
    return ["runs/a", "runs/b"]


def test_compare_tells_where_and_what(two, capsys, tmp_path):
    assert ecdit("compare", *two, "--html", "out/c.html", "--png", "out/c.png") == 0
    told = capsys.readouterr()
    said = told.out
    assert "2 of" not in said
    assert "A  runs/a  step 7" in said
    assert "B  runs/b  step 3 of 6" in said
    assert "A and B: first apart at step 3: train/loss 1.0 and 1.5 (3 steps in common)" in said
    assert "logged by some only: eval/loss (A)" in said
    assert "train.seed: 1 (A), 2 (B)" in said
    assert told.err.split() == ["out/c.html", "out/c.png"]
    page = (tmp_path / "out/c.html").read_text()
    assert "first apart at step 3" in page
    assert not re.search(r"(src|href)\s*=\s*[\"']?\s*(https?:)?//", page)
    assert (tmp_path / "out/c.png").read_bytes()[:4] == b"\x89PNG"
    assert ecdit("compare", *two, "--tolerance", "0.4") == 0
    assert "no difference in 3 steps" in capsys.readouterr().out


def test_compare_for_programs(two, capsys):
    assert ecdit("compare", *two, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["different"] == {"train.seed": [1, 2]}
    assert found["runs"][1]["parting"]["apart"]["step"] == 3
    assert found["runs"][0]["parting"] is None
    assert [line["seeds"] for line in found["table"]] == [2]
    assert found["only"] == {"eval/loss": ["A"]}


def test_compare_of_odd_folders(two, capsys, tmp_path):
    (tmp_path / "runs/new").mkdir()
    (tmp_path / "runs/new/metrics.jsonl").write_text("")  # a job that has just begun
    assert ecdit("compare", "runs/a", "runs/new", "--html", "c.html", "--png", "c.png") == 0
    said = capsys.readouterr().out
    assert "runs/new  no record yet" in said
    assert "no step that both have logged" in said
    assert ecdit("compare", "runs/a") == 0
    assert "A  " not in capsys.readouterr().out  # nothing to hold it against
    assert ecdit("compare", "runs/a", "runs/bb") == 79
    assert "runs/b" in capsys.readouterr().err
    assert ecdit("compare", *two, "--tolerance", "2") == 2

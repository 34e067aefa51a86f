"""`ecdit study routing` with two routers and seconds of training: it trains, measures, tells, and goes on where it was."""

from __future__ import annotations

import json

import pytest
from tiny_runs import WORDS

from ecdit_train import cli
from ecdit_train.errors import ConfigError
from ecdit_train.study import ROUTERS, Study

OWN = ("experiment", "moe.num_experts")
TINY = [w for w in WORDS if not w.startswith(OWN)] + [
    "moe.num_experts=8",
    "train.steps=4",
    "sample.steps=2",
    "observe.log_every=1",
]


def study(out, shards, *words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(["study", "routing", f"out={out}", "nproc=1", f"data.shards={shards}", *TINY, *words])
    return int(ended.value.code or 0)


def test_two_arms_and_the_rest_later(tiny_shards, tmp_path, capsys) -> None:
    out = tmp_path / "study"
    assert study(out, tiny_shards, "arms=[dense,expert_choice]", "seeds=[1]") == 0
    first = json.loads((out / "results.json").read_text())
    assert [m["arm"] for m in first] == ["dense", "expert_choice"]
    dense, chosen = first
    assert chosen["flops"] / dense["flops"] == pytest.approx(1.0, abs=0.02), "arms do not cost alike"
    assert (dense["experts_drawn"], chosen["experts_drawn"], chosen["budget"]) == (None, 2.0, 2.0)
    assert dense["unseen_loss"] != chosen["unseen_loss"]
    told = capsys.readouterr().out
    assert (out / "study.md").read_text() in told
    assert (out / "study.png").read_bytes().startswith(b"\x89PNG")

    assert study(out, tiny_shards, "arms=[dense,expert_choice]", "seeds=[1,2]") == 0
    assert capsys.readouterr().out.count("done before") == 2
    both = json.loads((out / "results.json").read_text())
    assert [(m["arm"], m["seed"]) for m in both] == [
        ("dense", 1),
        ("expert_choice", 1),
        ("dense", 2),
        ("expert_choice", 2),
    ]
    assert [m for m in both if m["seed"] == 1] == first
    assert "±" in (out / "study.md").read_text()


def test_other_words_are_other_runs_and_nothing_is_forgotten(tiny_shards, tmp_path, capsys) -> None:
    out = tmp_path / "study"
    assert study(out, tiny_shards, "arms=[dense,expert_choice]", "seeds=[1]") == 0
    before = json.loads((out / "results.json").read_text())
    runs = set(out.glob("*-1-*"))
    assert study(out, tiny_shards, "arms=[dense]", "seeds=[1]", "optim.lr=1e-4") == 0
    assert len(set(out.glob("*-1-*")) - runs) == 1, "the new words trained in the old folder"
    after = json.loads((out / "results.json").read_text())
    assert after[:2] == before
    assert after[2]["unseen_loss"] != before[0]["unseen_loss"]
    assert study(out, tiny_shards, "arms=[expert_choice]", "seeds=[1]") == 0
    assert "done before" in capsys.readouterr().out
    assert json.loads((out / "results.json").read_text()) == after


def test_a_stopped_job_goes_on_and_a_failed_one_is_told(tiny_shards, tmp_path, monkeypatch, capsys) -> None:
    from launch import local
    from launch.local import Ended, run_command

    def stopped_in_the_middle(argv):
        ended = run_command([*argv, "--stop-after", "2"])
        return Ended(code=ended.code, stopped=True)

    out, words = tmp_path / "study", ("arms=[dense]", "seeds=[1]")
    monkeypatch.setattr(local, "run_command", stopped_in_the_middle)
    assert study(out, tiny_shards, *words) == 75
    assert not (out / "results.json").exists()
    monkeypatch.setattr(local, "run_command", run_command)
    assert study(out, tiny_shards, *words) == 0
    assert json.loads((out / "results.json").read_text())[0]["arm"] == "dense"
    monkeypatch.setattr(local, "run_command", lambda argv: Ended(code=80, stopped=False))
    assert study(out, tiny_shards, "arms=[dense,expert_choice]", "seeds=[1]") == 80
    assert "expert_choice, seed 1: exit code 80" in (out / "study.md").read_text()


def plan(out, *words: str, arms=()) -> Study:
    return Study(out, size="small", arms=arms, seeds=[1], words=words, nproc=2, config_dir=None)


def test_every_router_composes_and_costs_what_dense_costs(tmp_path) -> None:
    from ecdit_train.plan.flops import per_step

    jobs = plan(tmp_path / "study").jobs
    assert [j.arm for j in jobs] == list(ROUTERS)
    flops = [per_step(j.config, checkpointing="none") for j in jobs]
    cost = [f.model - f.by_part["router"] for f in flops]
    assert cost == pytest.approx([cost[0]] * len(cost), rel=1e-12)
    # A router of its own with a layer or a predictor costs what it costs; the table says so.
    assert all(f.by_part["router"] < 0.05 * c for f, c in zip(flops, cost, strict=True))
    assert not (tmp_path / "study").exists()


def test_what_is_wrong_is_said_before_anything_is_made(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"'expert_choise'.*nearest valid: expert_choice"):
        plan(tmp_path / "study", arms=["dense", "expert_choise"])
    with pytest.raises(ConfigError, match=r"train\.steps = 0"):
        plan(tmp_path / "study", "train.steps=0")
    for word in ("moe=dense", "train.seed=3", "run=here"):
        with pytest.raises(ConfigError, match="is what the study itself sets"):
            plan(tmp_path / "study", word)
    with pytest.raises(ConfigError, match=r"data\.resolution = 48: the study's pictures have 24 pixels"):
        plan(tmp_path / "study", "data.resolution=48", "moe.group_size=576")
    assert not (tmp_path / "study").exists()
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "results.json").write_text("[1]")
    with pytest.raises(ConfigError, match="not what a study writes"):
        plan(tmp_path / "study")

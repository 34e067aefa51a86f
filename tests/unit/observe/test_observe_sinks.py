"""The JSONL file is the truth; sinks copy it, and none of them can break a rank."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

import pytest

from ecdit_train.errors import RunOwnedError
from ecdit_train.observe.journal import Journal, read_jsonl, read_records
from ecdit_train.observe.redact import REDACTED, redact
from ecdit_train.observe.sinks import SinkContext, Sinks, open_sinks

# --- JSONL -----------------------------------------------------------------------------------------------------------


def test_every_record_is_in_the_file_before_log_returns(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    journal = Journal(tmp_path / "run")
    journal.log(1, {"train/loss": 0.5})
    journal.log(2, {"train/loss": float("nan"), "note": "ü"})
    first, second = read_records(tmp_path / "run")
    assert read_jsonl(tmp_path / "run" / "metrics.jsonl") == [first, second]
    assert first["step"] == 1
    assert first["train/loss"] == 0.5
    assert abs(first["time"] - time.time()) < 60
    assert second["train/loss"] is None
    assert second["note"] == "ü"


def steps_of(run: Path) -> list[tuple[int, int]]:
    """Step and life of what counts; what people tail says the same."""
    counted = [(r["step"], r["by"]) for r in read_records(run)]
    assert [(r["step"], r["by"]) for r in read_jsonl(run / "metrics.jsonl")] == counted
    return counted


def test_resume_leaves_no_duplicate_step_and_destroys_none(tmp_path: Path) -> None:
    first = Journal(tmp_path, life=1)
    for step in range(10, 60, 10):
        first.log(step, {"by": 1})
    second = Journal(tmp_path, life=2, after=30)
    first.log(60, {"by": 1})  # does not know yet that it lost the folder
    for step in range(40, 70, 10):
        second.log(step, {"by": 2})
        first.log(step + 1, {"by": 1})
    first.log(70, {"by": 1})
    assert steps_of(tmp_path) == [(10, 1), (20, 1), (30, 1), (40, 2), (50, 2), (60, 2)]
    second.go_back(40)
    second.log(50, {"by": 3})
    assert steps_of(tmp_path) == [(10, 1), (20, 1), (30, 1), (40, 2), (50, 3)]
    lines = [line for life in (1, 2) for line in read_jsonl(tmp_path / "metrics" / f"{life:04d}.jsonl")]
    assert [(r["step"], r["by"]) for r in lines if "by" in r] == [
        *[(step, 1) for step in (10, 20, 30, 40, 50, 60, 41, 51, 61, 70)],
        *[(40, 2), (50, 2), (60, 2), (50, 3)],
    ]


def test_a_log_from_before_there_were_lives_goes_on(tmp_path: Path) -> None:
    old = '{"step": 1, "by": 0}\n{"step": 2, "by": 0}\n{"step": 3, "by"'
    (tmp_path / "metrics.jsonl").write_text(old)
    assert [r["step"] for r in read_records(tmp_path)] == [1, 2]
    Journal(tmp_path, life=1, after=1).log(2, {"by": 1})
    assert steps_of(tmp_path) == [(1, 0), (2, 1)]
    assert (tmp_path / "metrics" / "0000.jsonl").read_text() == old


def test_a_copied_folder_counts_its_lives_anew_and_overwrites_none(tmp_path: Path) -> None:
    Journal(tmp_path, life=7).log(1, {"by": 7})
    again = Journal(tmp_path, life=1, after=1)
    again.log(2, {"by": 1})
    assert again.life == 8
    assert steps_of(tmp_path) == [(1, 7), (2, 1)]


def test_a_cut_last_line_is_no_record_and_nothing_is_glued_to_it(tmp_path: Path) -> None:
    Journal(tmp_path, life=1).log(1, {"by": 1})
    for name in ("metrics.jsonl", "metrics/0001.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write('{"step": 2, "train/lo')
    Journal(tmp_path, life=2, after=1).log(2, {"by": 2})
    assert steps_of(tmp_path) == [(1, 1), (2, 2)]
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]


def test_a_fenced_life_writes_nothing(tmp_path: Path) -> None:
    lost = False

    def ours() -> None:
        if lost:
            raise RunOwnedError("another's")

    journal = Journal(tmp_path, still_ours=ours)
    journal.log(1, {})
    before, lost = {p: p.read_bytes() for p in tmp_path.rglob("*.jsonl")}, True
    for call in (lambda: journal.log(2, {}), lambda: journal.go_back(0)):
        with pytest.raises(RunOwnedError):
            call()
    assert {p: p.read_bytes() for p in tmp_path.rglob("*.jsonl")} == before


def test_damage_in_the_middle_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nrubbish\n{"step": 2}\n')
    assert [r["step"] for r in read_jsonl(path)] == [1, 2]
    assert "line 2" in caplog.text


def test_sinks_that_have_a_rewind_are_told() -> None:
    class Old:
        def close(self) -> None:
            told.append("closed")

    class New(Old):
        def rewind(self, step: int) -> None:
            told.append(step)

    told: list[object] = []
    sinks = Sinks(None, {"old": Old(), "new": New()})
    sinks.rewind(7)
    sinks.close()
    assert told == [7, "closed", "closed"]


def test_only_rank_0_writes(tmp_path: Path) -> None:
    def opened(rank: int) -> Sinks:
        return open_sinks(SinkContext(folder=tmp_path, config={}, name="n", resume_step=0), {}, rank=rank)

    other = opened(1)
    other.log(1, {"train/loss": 1.0})
    other.image(tmp_path / "x.png", key="samples", step=1, caption="")
    other.close()
    assert not list(tmp_path.iterdir())
    main = opened(0)
    main.log(1, {"train/loss": 1.0})
    main.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics", "metrics.jsonl"]


def test_without_sinks_nothing_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would raise
    threads = threading.active_count()
    sinks = open_sinks(SinkContext(folder=tmp_path, config={}, name="n", resume_step=0), {}, rank=0)
    sinks.log(1, {"train/loss": 1.0})
    sinks.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics", "metrics.jsonl"]
    assert threading.active_count() == threads


def test_redaction_knows_secrets_from_sizes() -> None:
    tree = {
        "max_tokens": 64,
        "api_key": "abc",
        "password": None,
        "env": ["WANDB_API_KEY=abc", "NCCL_DEBUG=INFO"],
        "hf_token": "x",
        "lr": 3e-4,
        "prompts": ("a key on a table",),
    }
    assert redact(tree) == {
        "max_tokens": 64,
        "api_key": REDACTED,
        "password": None,
        "env": [f"WANDB_API_KEY={REDACTED}", "NCCL_DEBUG=INFO"],
        "hf_token": REDACTED,
        "lr": 3e-4,
        "prompts": ["a key on a table"],
    }

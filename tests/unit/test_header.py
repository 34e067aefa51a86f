"""The first lines of a run: there before anything slow, and true."""

from __future__ import annotations

import subprocess
import sys

import pytest
from cli_commands import ecdit
from tiny_runs import configure, words

from ecdit_train import cli, header
from ecdit_train.config.compose import compose
from ecdit_train.plan import parameters


def test_it_needs_no_torch() -> None:
    code = "import sys; import ecdit_train.header; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_it_says_what_runs_where(tmp_path) -> None:
    config = compose(words(tmp_path / "run", "shards", "parallel.ep=2", "parallel.dp_shard=-1"), local=False)
    first, second = header.opening(config, version="9.9", world=8, goes_on=False).splitlines()
    assert first == f"ecdit 9.9: shapes_tiny starts in {tmp_path / 'run'} on 8 ranks (shard 8, ep 2)"
    assert "2 layers of width 64, 4 experts in 1 of them (ExpertChoice, 2 a token), 16 x 16 pixels" in second
    assert "12 steps of 8 images, fp32" in second
    dense = configure(tmp_path / "run", "shards", "moe=dense")
    assert "goes on in" in header.opening(dense, version="9.9", world=1, goes_on=True)
    assert "(not spread)" in header.opening(dense, version="9.9", world=1, goes_on=True)
    assert "dense, 16 x 16" in header.opening(dense, version="9.9", world=1, goes_on=True)


@pytest.mark.parametrize(
    ("count", "text"), [(97_210_000_000, "97.2B"), (1_940_000, "1.9M"), (1500, "1.5K"), (12, "12")]
)
def test_short_numbers(count, text) -> None:
    assert header.short(count) == text


def test_a_run_tells_its_beginning_in_order(tiny_shards, tmp_path, capsys) -> None:
    assert ecdit("train", *words(tmp_path / "run", tiny_shards, "train.steps=4")) == 0
    out = capsys.readouterr().out
    counted = parameters.count(configure(tmp_path / "run", tiny_shards))
    told = [
        "starts in",
        "starting torch",
        "opening data",
        f"{header.short(counted.network)} parameters",
        "first batch",
        "step 1 took",
        "step 4/4",
    ]
    places = [out.index(words) for words in told]
    assert places == sorted(places)
    assert ecdit("resume", tmp_path / "run", "train.steps=5") == 0
    assert "goes on in" in capsys.readouterr().out


@pytest.mark.parametrize("verb", cli.NEEDS_WORDS)
def test_a_bare_verb_explains_itself(verb, capsys) -> None:
    assert ecdit(verb) == 2
    out = capsys.readouterr().err
    assert f"usage: ecdit {verb}" in out
    assert len(out.splitlines()) > 5


def test_ranks_without_words_are_bare_too(capsys) -> None:
    assert ecdit("--nproc", 2, "train") == 2
    assert "usage: ecdit train" in capsys.readouterr().err


def test_nothing_at_all_lists_the_verbs(capsys) -> None:
    assert ecdit() == 2
    assert "goes on where it stopped" in capsys.readouterr().err

"""What we use of Hydra's insides does what it did, and leaves nothing behind."""

from __future__ import annotations

import logging
import os

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from ecdit_train.config import compose
from ecdit_train.config.resolve import declarations_only


@pytest.fixture(autouse=True)
def untouched(tmp_path, monkeypatch):
    """Hydra's global state, the root logger and the working directory are as before each test."""
    monkeypatch.chdir(tmp_path)
    root = logging.getLogger()
    before = (root.level, root.handlers[:])
    with declarations_only():
        yield
    assert not GlobalHydra.instance().is_initialized()
    assert HydraConfig.instance().cfg is None
    assert (root.level, root.handlers) == before
    assert os.getcwd() == str(tmp_path)
    assert not list(tmp_path.iterdir())


def test_composing():
    compose.compose(["experiment=shapes_tiny"])


def test_cfg(capsys):
    compose.open_app().show(["moe=token_choice"], cfg="job", package="moe.router", resolve=False)
    out = capsys.readouterr().out
    assert out.startswith("# @package moe.router\n")
    assert "top_k: 2" in out
    compose.open_app().show([], cfg="hydra", package=None, resolve=False)
    assert "searchpath" in capsys.readouterr().out


def test_info(capsys):
    compose.open_app().info(["moe=token_choice"], about="defaults")
    assert "moe/router/token_choice" in capsys.readouterr().out
    compose.open_app().info([], about="searchpath")
    assert "command-line" not in capsys.readouterr().out


def test_interpolations_of_hydra():
    cfg = compose.compose(["moe=token_choice", "run=runs/${hydra:runtime.choices.moe}-${train.seed}", "train.seed=7"])
    assert cfg.run == "runs/token_choice-7"


def test_jobs_of_a_sweep():
    words = ["moe=dense,token_choice", "train.seed=range(1,3)", "model=glob(x*)", "hydra.sweep.dir=x", "train.steps=5"]
    jobs = compose.expand(words)
    assert len(jobs) == 2 * 2 * 2
    assert jobs[0] == ["moe=dense", "train.seed=1", "model=xl", "train.steps=5"]
    assert jobs[-1] == ["moe=token_choice", "train.seed=2", "model=xxl", "train.steps=5"]


def test_a_range_without_an_end_is_refused():
    with pytest.raises(compose.ConfigError, match="does not compose"):
        compose.expand(["train.seed=interval(0,1)"])

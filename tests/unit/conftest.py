"""A run that the command made, for the tests of its verbs."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_commands import ecdit
from tiny_runs import words


@pytest.fixture(scope="module")
def trained(tiny_shards, tmp_path_factory) -> Path:
    """A run of 4 steps, made by the command. Read-only; copy it to change it."""
    run = tmp_path_factory.mktemp("cli") / "run"
    assert ecdit("train", *words(run, tiny_shards, "train.steps=4")) == 0
    return run

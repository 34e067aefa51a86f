"""Shared by all tests: a small shapes set, made once. `tiny_runs.py` beside this file makes runs out of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from data_pipeline.shapes.make import make_shapes

# Tensors here are tiny: threads only wait for each other, and sums would depend on how many there are.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 samples of 16 x 16 pixels in 5 shards: an epoch is 25 steps of 8. Read-only; damage a copy."""
    folder = tmp_path_factory.mktemp("tiny-shards")
    make_shapes(folder, count=200, resolution=16, seed=3, samples_per_shard=40)
    return folder

"""Configurations composed once for all tests of this folder."""

from __future__ import annotations

from functools import cache

import pytest

from ecdit_train.config.compose import compose
from ecdit_train.config.schema import RunConfig


@pytest.fixture(scope="session")
def base() -> RunConfig:
    """The default configuration."""
    return compose([], local=False)


@pytest.fixture(scope="session")
def preset():
    """An experiment by name."""
    return cache(lambda name: compose([f"experiment={name}"], local=False))

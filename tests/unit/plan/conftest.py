"""Configurations of the shipped presets, without anybody's conf/local."""

from __future__ import annotations

import functools

import pytest

from ecdit_train.config.compose import compose


@functools.cache
def _compose(words):
    return compose(words, local=False)


@pytest.fixture(scope="session")
def cfg_of():
    """cfg_of("ec_dit_m_64e", "train.microbatch=16") -> RunConfig."""
    return lambda experiment, *words: _compose((f"experiment={experiment}", *words))

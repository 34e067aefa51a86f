"""Whole steps with something around them, which is entered once and left before the run ends."""

from __future__ import annotations

from contextlib import contextmanager

import pytest

from benchmarks.whole_step import WARM, whole_steps
from ecdit_train.parallel.runtime import alone


def test_what_is_around_sees_the_steps_it_was_promised(tmp_path):
    seen = []

    @contextmanager
    def around():
        seen.append("in")
        yield
        seen.append("out")

    loss = whole_steps(tmp_path, runtime=alone(), around=around, steps=2)
    assert seen == ["in", "out"]
    assert 0 < loss < 10


def test_what_it_raises_ends_the_run(tmp_path):
    def around():
        raise RuntimeError("no wait allowed")

    with pytest.raises(RuntimeError, match="no wait allowed"):
        whole_steps(tmp_path, runtime=alone(), around=around, steps=1, words=[f"train.steps={WARM + 3}"])

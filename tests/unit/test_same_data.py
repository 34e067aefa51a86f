"""Ranks that read different data: a set that is indexed anew while a job starts."""

from __future__ import annotations

import pytest

from data_pipeline.errors import WrongView
from ecdit_train.build import same_data


def test_ranks_that_read_other_data_are_named() -> None:
    state = {"v": 1, "step": 0, "seed": 0, "view_sha256": "a" * 64}
    same_data([state, dict(state), dict(state)])
    with pytest.raises(WrongView, match=r"rank 1 \(of 1\) reads other data than rank 0: view_sha256 differ"):
        same_data([state, state | {"view_sha256": "b" * 64}, state])
    with pytest.raises(WrongView, match="more keys differ"):
        same_data([state, state | {"taken": {"n": 1}}])

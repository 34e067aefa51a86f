"""Rank arithmetic: products and coordinates; no torch."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plain_configs import PARALLEL

from ecdit_train.parallel.degrees import Degrees, resolve_degrees


def test_what_is_left() -> None:
    d = resolve_degrees(replace(PARALLEL, dp_replicate=2, tp=2, ep=4), 16)
    assert d == Degrees(world=16, dp_replicate=2, dp_shard=4, tp=2, ep=4)
    assert (d.dp, d.edp) == (8, 4)


@given(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3), st.integers(0, 9))
def test_every_rank_has_its_own_place(rep: int, shard: int, tp: int, ep: int) -> None:
    world = 2 ** (rep + shard + tp)
    parallel = replace(PARALLEL, dp_replicate=2**rep, dp_shard=2**shard, tp=2**tp, ep=2 ** min(ep, rep + shard + tp))
    d = resolve_degrees(parallel, world)
    assert d.dp * d.tp == d.edp * d.ep == world
    for coordinates, sizes in ((d.dense, (d.dp_replicate, d.dp_shard, d.tp)), (d.sparse, (d.edp, d.ep))):
        places = [coordinates(rank) for rank in range(world)]
        assert len(set(places)) == world
        assert all(0 <= c < n for place in places for c, n in zip(place, sizes, strict=True))
    # Neighbours differ in the fast axes.
    assert d.tp == 1 or d.dense(0)[:2] == d.dense(1)[:2]
    assert d.ep == 1 or d.sparse(0)[0] == d.sparse(1)[0]


@pytest.mark.parametrize(
    "change", [{"tp": 3}, {"ep": 7}, {"dp_replicate": 3}, {"dp_shard": 2}, {"sequence_parallel": True}]
)
def test_what_was_not_validated_is_our_own_mistake(change: dict[str, object]) -> None:
    with pytest.raises(AssertionError):
        resolve_degrees(replace(PARALLEL, **change), 8)


def test_no_torch() -> None:
    code = "import sys, ecdit_train.parallel.degrees; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""The lean expert layer equals one process's plain one on every layout: values, every gradient, norm and next weights, also where
its rows travel, in parts, under recomputation, and for each kind of experts and sum."""

from __future__ import annotations

from dataclasses import replace

import pytest
from dist_cases import CAPPED, MOE, THRESHOLD, TOKEN_CHOICE, case
from test_dist_grid import assert_equal

from ecdit_train.model.dispatchers.deterministic import Deterministic
from ecdit_train.model.experts.swiglu import SwiGLU

LEAN = replace(MOE, form="lean")
ORDERED = replace(LEAN, dispatcher=Deterministic(cap=None))
GATED = replace(LEAN, experts=SwiGLU())
UNEVEN = replace(THRESHOLD, form="lean")
"""Takes the plain way."""


def test_two_ranks() -> None:
    assert_equal(
        2,
        [
            *(case(moe=LEAN, **layout) for layout in ({}, {"rep": 2}, {"tp": 2}, {"ep": 2}, {"tp": 2, "ep": 2})),
            case(moe=LEAN, ep=2, chunks=2),
            case(moe=LEAN, ep=2, chunks=2, ac="selective"),
            case(moe=LEAN, ep=2, ac="full"),
            case(moe=GATED, tp=2, ep=2),
            case(moe=ORDERED, tp=2),
            case(moe=UNEVEN, ep=2),
            case(moe=LEAN, tp=2, ep=2, dtype="float32"),
            case(moe=LEAN, ep=2, microbatches=2),
        ],
    )


def test_four_ranks() -> None:
    assert_equal(
        4,
        [
            case(moe=LEAN, tp=2, ep=4),
            case(moe=LEAN, ep=4, chunks=3),
            case(moe=GATED, tp=2, ep=4, chunks=2, ac="selective"),
            case(moe=ORDERED, rep=2, ep=2, ac="selective"),
            case(moe=replace(TOKEN_CHOICE, form="lean"), tp=2, ep=2, chunks=2),
            case(moe=replace(CAPPED, form="lean"), tp=2, ep=2),
            case(moe=LEAN, rep=2, tp=2, ep=4, microbatches=2, reshard=False),
            case(moe=LEAN, tp=2, ep=4, dtype="float32"),
            case(moe=LEAN, ep=2, microbatches=2, reduce="microbatch"),
        ],
    )


@pytest.mark.slow
@pytest.mark.parametrize("ac", ["none", "selective", "full"])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_eight_ranks(tp: int, ac: str) -> None:
    moes = (LEAN, ORDERED, GATED)
    grid = [(ep, rep, chunks) for ep in (1, 2, 4, 8) for rep in (1, 2) for chunks in ((1, 2) if ep > 1 else (1,))]
    assert_equal(
        8, [case(moe=moes[n % 3], tp=tp, ep=ep, rep=rep, chunks=k, ac=ac) for n, (ep, rep, k) in enumerate(grid)]
    )

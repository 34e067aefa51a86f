"""What may be switched on top of a layout changes no number: checkpointing, overlap, accumulation, resharding, determinism."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from dist_cases import MODEL, MOE, Case, case, check_cases, run_parallel
from dist_harness import run_distributed

from ecdit_train.parallel.mesh import make_mesh

BOUND = 1e-10
DETERMINISTIC = replace(MOE, combine="deterministic")
TOKEN_CHOICE = replace(MOE, router="token_choice")


def assert_equal(world: int, cases: list[Case]) -> None:
    for name, errors in run_distributed(world, check_cases, cases, timeout=280)[0]:
        print(f"{world} ranks  {name:80s} {errors}")
        assert errors.within(BOUND), f"{name}: {errors}"


def test_options() -> None:
    all_axes = dict(tp=2, ep=4)
    assert_equal(4, [
        case(**all_axes, ac="full"), case(**all_axes, ac="selective"), case(tp=2, ac="selective", moe=TOKEN_CHOICE),
        case(ep=2, ac="selective", chunks=2), case(ep=2, ac="full", chunks=2),
        case(**all_axes, chunks=2), case(ep=4, chunks=3), case(tp=2, ep=2, chunks=2, moe=TOKEN_CHOICE),
        case(ep=2, microbatches=2), case(tp=2, ep=2, microbatches=4), case(rep=2, ep=2, microbatches=2),
        case(rep=2, tp=2, ep=4, microbatches=2, ac="selective", chunks=2, reshard=False),
        case(**all_axes, reshard=False), case(**all_axes, moe=DETERMINISTIC), case(ep=2, moe=DETERMINISTIC, chunks=2),
    ])


def test_more_ranks_than_rows() -> None:
    """2 experts on 4 ranks of one expert mesh: they are cut along another dim; biases of 16 rows over 4, and so on."""
    few = replace(MOE, experts=2)
    assert_equal(4, [case(moe=few), case(ep=2, moe=replace(MOE, experts=4)), case(tp=2, moe=replace(MOE, experts=6, capacity_factor=1.5))])


def bits(runtime: Any, first: Case, second: Case) -> bool:
    a, b = (run_parallel(c, make_mesh(c.parallel, device_type="cpu", world=runtime.world)) for c in (first, second))
    return a.losses == b.losses and all(torch.equal(w, b.weights[n]) for n, w in a.weights.items())


def test_overlap_gives_the_same_bits() -> None:
    """The chunks are summed in the order of a single chunk, so overlap is not a numerical choice."""
    assert all(run_distributed(4, bits, case(tp=2, ep=2, steps=2), case(tp=2, ep=2, chunks=2, steps=2)))

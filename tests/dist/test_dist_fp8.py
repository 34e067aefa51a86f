"""8-bit products on several ranks: every gradient, the norm, the next weights and what is remembered equal one process.

In fp64 a value is rounded to 8 bits the same way on every layout unless its scale differs, so the bound of the other grids
holds: to a wrong scale, all values near the smallest normal number answer.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import dist_cases
import pytest
import te_stand_in
from dist_cases import DENSE, MODEL, MOE, Case, case, check_cases
from dist_compare import Errors
from dist_harness import run_distributed

from ecdit_train.model.experts.swiglu import SwiGLU

BOUND = 1e-10
FEW_KV = replace(MODEL, kv_heads=1)
LEAN = replace(MOE, form="lean")
GATED = replace(LEAN, experts=SwiGLU())


def errors_of(world: int, cases: list[Case]) -> list[tuple[str, Errors]]:
    found = run_distributed(world, check_cases, cases, timeout=280)[0]
    for name, errors in found:
        print(f"{world} ranks  {name:70s} {errors}")
    return found


def test_two_ranks_equal_one() -> None:
    """Scales of tensors that tp cuts are agreed on, those that were remembered are the same everywhere, and blocks are whole."""
    for name, errors in errors_of(2, [
        case(tp=2, moe=DENSE, fp8="current"), case(tp=2, ep=2, fp8="current"), case(tp=2, ep=2, fp8="mxfp8"),
        case(tp=2, ep=2, fp8="delayed"), case(ep=2, fp8="delayed"), case(fp8="delayed", ac="full"),
        case(tp=2, ep=2, fp8="delayed", ac="selective"), case(ep=2, fp8="delayed", chunks=2, microbatches=2),
    ]):  # fmt: skip
        assert errors.within(BOUND, grad=BOUND), f"{name}: {errors}"


def test_the_lean_layer() -> None:
    for name, errors in errors_of(2, [
        case(moe=LEAN, tp=2, ep=2, fp8="current"), case(moe=GATED, tp=2, ep=2, fp8="delayed"),
        case(moe=LEAN, ep=2, fp8="delayed", chunks=2, microbatches=2),
        case(moe=LEAN, ep=2, fp8="delayed", ac="selective"), case(moe=LEAN, tp=2, ep=2, fp8="mxfp8", ac="full"),
    ]):  # fmt: skip
        assert errors.within(BOUND, grad=BOUND), f"{name}: {errors}"


@pytest.mark.parametrize("poison", ["fp8_own_scale", "fp8_stale_scale"])
def test_a_wrong_scale_is_found(poison) -> None:
    recipe = {"fp8_own_scale": "current", "fp8_stale_scale": "delayed"}[poison]
    ((_, errors),) = errors_of(2, [case(tp=2, ep=2, fp8=recipe, poison=poison, steps=1)])
    assert errors.grad > 1e3 * BOUND


def check_by_engine(runtime: Any, cases: list[Case]) -> list[tuple[str, Errors]]:
    """As `check_cases`, the ranks multiplying by the stand-in for Transformer Engine; one process still emulates."""
    whole = dist_cases.parallelize

    def parallelize(model: Any, *, fp8: Any, **rest: Any) -> Any:
        return whole(model, fp8=replace(fp8, backend="transformer_engine"), **rest)

    with (
        te_stand_in.used(blackwell=True, doubles=True) as device,
        mock.patch.object(dist_cases, "parallelize", parallelize),
    ):
        found = check_cases(runtime, cases)
    assert {"product", "grouped product", "cast", "cast of blocks"} <= set(device.calls)
    return found


def test_by_transformer_engine_too() -> None:
    """Scales that tp agrees on, experts of ep, memory; recomputed, in parts, and with blocks."""
    for name, errors in run_distributed(2, check_by_engine, [
        case(tp=2, ep=2, fp8="current"), case(tp=2, ep=2, fp8="delayed"), case(tp=2, ep=2, fp8="mxfp8"),
        case(ep=2, fp8="delayed", chunks=2, microbatches=2), case(fp8="delayed", ac="full"),
    ], timeout=280)[0]:  # fmt: skip
        print(f"{name:70s} {errors}")
        assert errors.within(BOUND, grad=BOUND), f"{name}: {errors}"


def test_a_scale_for_each_rank_is_near() -> None:
    """`current` over data-parallel ranks: scales differ by powers of two, so only values near the smallest normal number do."""
    for name, errors in errors_of(2, [case(ep=2, fp8="current", steps=1), case(fp8="current", steps=1)]):
        assert BOUND < errors.grad < 1e-4, f"{name}: {errors}"
        assert errors.loss < 1e-6


def test_shared_kv_heads_are_near() -> None:
    """Ranks that share a kv head round their own part of its gradient, one process the sum: another rounding, as large as any."""
    for name, errors in errors_of(2, [case(tp=2, model=FEW_KV, fp8="current", steps=1)]):
        assert BOUND < errors.grad < 0.25, f"{name}: {errors}"
        assert errors.loss < BOUND

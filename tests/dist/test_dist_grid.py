"""Loss, every gradient, norm and weights after 3 steps equal one process, for every axis alone, every
pair, and all together.

In float64 nothing hides behind rounding: errors are below 1e-13 unless something is wrong. float32 cases show what is
left of it in production's type. In both, the copies that several ranks hold must agree to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from dist_cases import (
    CAPPED,
    DENSE,
    EXPERT_CHOICE,
    IMAGES,
    KEPT,
    MODEL,
    MOE,
    THRESHOLD,
    TOKEN_CHOICE,
    Case,
    case,
    check_cases,
)
from dist_harness import run_distributed

from ecdit_train.model.dispatchers.deterministic import Deterministic

BOUND_FP64 = 1e-10
BOUND_FP32, BOUND_FP32_GRAD = 1e-5, 5e-5
"""Attention's query and key gradients are differences of nearly equal numbers: one process against itself in another
summation order shows 1e-5 there."""

FEW_KV = replace(MODEL, kv_heads=1)
MANY_KV = replace(MODEL, kv_heads=4)


def whole_microbatch(world: int, *, tp: int = 1) -> int:
    """Group of scope `batch`: all tokens of a data-parallel rank."""
    return IMAGES * KEPT * tp // world


def assert_equal(world: int, cases: list[Case], *, check: Callable[..., Any] = check_cases) -> None:
    """`check`: what each rank makes of the cases, where it is not `dist_cases.check_cases`."""
    for name, errors in run_distributed(world, check, cases, timeout=280)[0]:
        print(f"{world} ranks  {name:90s} {errors}")
        bound, grad = (BOUND_FP32, BOUND_FP32_GRAD) if "float32" in name else (BOUND_FP64, BOUND_FP64)
        assert errors.within(bound, grad=grad), f"{name}: {errors}"


def test_two_ranks() -> None:
    """Every axis alone, and experts folded over tp."""
    assert_equal(
        2,
        [
            case(),
            case(rep=2),
            case(tp=2),
            case(ep=2),
            case(tp=2, ep=2),
            case(tp=2, moe=DENSE, optim="adamw"),
            case(ep=2, moe=TOKEN_CHOICE, optim="adamw"),
            case(ep=2, group_tokens=whole_microbatch(2)),
            case(tp=2, model=FEW_KV),
            case(dtype="float32"),
            case(tp=2, dtype="float32"),
            case(ep=2, dtype="float32"),
            case(tp=2, ep=2, dtype="float32"),
            case(tp=2, moe=DENSE, dtype="float32"),
            case(ep=2, moe=TOKEN_CHOICE, dtype="float32"),
            case(ep=2, group_tokens=whole_microbatch(2), dtype="float32"),
        ],
    )


def test_four_ranks() -> None:
    """Every pair of axes."""
    assert_equal(
        4,
        [
            case(tp=2, ep=2),
            case(ep=2),
            case(ep=4),
            case(tp=2),
            case(tp=2, ep=4, moe=TOKEN_CHOICE),
            case(tp=4, ep=2),
            case(tp=4, ep=4, model=FEW_KV),
            case(rep=2, ep=2),
            case(rep=2, tp=2, ep=2),
            case(tp=2, ep=2, group_tokens=whole_microbatch(4, tp=2)),
            case(tp=2, ep=2, optim="adamw", dtype="float32"),
            case(ep=4, dtype="float32"),
            case(tp=2, dtype="float32"),
            case(ep=2, dtype="float32"),
            case(rep=2, tp=2, ep=2, dtype="float32"),
            case(tp=2, ep=4, moe=TOKEN_CHOICE, dtype="float32"),
        ],
    )


def test_eight_ranks_all_axes() -> None:
    """dp_replicate x dp_shard x tp with experts over 4."""
    assert_equal(8, [case(rep=2, tp=2, ep=4), case(tp=2, ep=2), case(tp=2, ep=4, dtype="float32")])


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["some", "every"])
def test_a_varying_number_of_rows(every: bool) -> None:
    """Rows per expert vary: the uneven exchange, and a static cap that drops some, on every axis alone and together. By default
    layouts take turns with the two."""
    for world, layouts in (
        (
            2,
            [{}, {"tp": 2}, {"ep": 2}, {"tp": 2, "ep": 2}, {"ep": 2, "microbatches": 2}, {"rep": 2, "ac": "selective"}],
        ),
        (4, [{"tp": 2, "ep": 2}, {"ep": 4}, {"tp": 2, "ep": 4, "ac": "selective"}, {"ep": 2, "ac": "full"}]),
        (8, [{"rep": 2, "tp": 2, "ep": 4}, {"ep": 8}]),
    ):
        both = [case(moe=moe, **layout) for layout in layouts for moe in (THRESHOLD, CAPPED)]
        cases = both if every else [both[2 * n + n % 2] for n in range(len(layouts))]
        if world == 2:
            cases += [
                case(moe=CAPPED, ep=2, chunks=2),
                case(moe=replace(THRESHOLD, dispatcher=Deterministic(cap=None)), tp=2, ep=2),
            ]
            cases += [case(moe=moe, tp=2, ep=2, dtype="float32") for moe in (THRESHOLD, CAPPED)]
        assert_equal(world, cases)


def test_models_after_dit_and_what_routers_look_at() -> None:
    """Blocks with their own modulation and no cross-attention, experts in all of them and of another width, a shared
    expert; routers that look at the residual stream or at the timestep."""
    after_dit = replace(MODEL, modulation="block", cross_attention=False)
    fine = replace(MOE, layers="all", expert_ratio=0.5, shared_experts=3)
    layouts: tuple[tuple[int, list[dict[str, int]]], ...] = (
        (2, [{}, {"tp": 2}, {"ep": 2}, {"tp": 2, "ep": 2}]),
        (4, [{"tp": 2, "ep": 2}, {"ep": 4}, {"tp": 2, "rep": 2}]),
    )
    for world, axes in layouts:
        cases = [case(moe=fine, model=after_dit, **layout) for layout in axes]
        for sees in ("hidden", "timestep"):
            moe = replace(MOE, router=replace(EXPERT_CHOICE, sees=sees))
            cases += [case(moe=moe, model=model, **axes[-1]) for model in (MODEL, after_dit)]
        cases.append(case(moe=fine, model=after_dit, dtype="float32", ac="selective", **axes[-1]))
        assert_equal(world, cases)


@pytest.mark.slow
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("router", ["expert_choice", "token_choice", "threshold", "capped"])
def test_eight_ranks_grid(router: str, tp: int) -> None:
    moe = {"expert_choice": MOE, "token_choice": TOKEN_CHOICE, "threshold": THRESHOLD, "capped": CAPPED}[router]
    model = MANY_KV if router == "token_choice" else MODEL
    assert_equal(8, [case(tp=tp, ep=ep, rep=rep, moe=moe, model=model) for ep in (1, 2, 4, 8) for rep in (1, 2)])

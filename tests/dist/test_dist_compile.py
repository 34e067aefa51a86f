"""torch.compile changes no number, and the number of graphs does not grow with depth (each costs minutes, and beyond
torch's limit a block silently stays uncompiled)."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from dist_cases import MODEL, MOE, Case, Errors, case, check_cases
from dist_harness import run_distributed

from ecdit_train.parallel import compiling


def check_compiled(runtime: Any, cases: list[Case], backend: str) -> list[tuple[str, Errors, int]]:
    compiling.torch.compile = functools.partial(torch.compile, backend=backend)
    results = []
    for c in cases:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        results += [(*r, torch._dynamo.utils.counters["stats"]["unique_graphs"]) for r in check_cases(runtime, [c])]
    return results


def assert_equal(cases: list[Case], *, backend: str) -> list[int]:
    results = run_distributed(2, check_compiled, cases, backend, timeout=500)[0]
    for name, errors, graphs in results:
        print(f"{name:80s} {graphs} graphs {errors}")
        assert errors.within(1e-10), f"{name}: {errors}"
    return [graphs for _, _, graphs in results]


def test_compiled_graphs() -> None:
    """Tracing and autograd partitioning, without code generation: a dense block, a sparse one before and after
    its layer, its experts."""
    deep = replace(MODEL, layers=6)
    plain, lean = assert_equal(
        [
            case(tp=2, ep=2, compiled=True, ac="selective", steps=1, model=deep),
            case(tp=2, ep=2, compiled=True, steps=1, model=deep, moe=replace(MOE, form="lean")),
        ],
        backend="aot_eager",
    )
    assert plain == 4
    assert lean == 5  # what is between a lean layer's products, each way


ALL = ("attention", "projections", "feed_forward", "experts")


def test_compiled_graphs_around_what_is_kept() -> None:
    """What is kept is dispatched op by op between graphs, of which there are more, but as many at 4 layers as at 6."""
    c = case(tp=2, compiled=True, ac="selective", keep=ALL, steps=1, model=replace(MODEL, layers=6))
    (graphs,) = assert_equal([c], backend="aot_eager")
    assert graphs == 9


@pytest.mark.slow
def test_compiled_graphs_around_8_bits() -> None:
    """Products stand between graphs, and what passes over their operands is compiled for each kind of them: as many graphs at 4
    layers as at 6."""
    how = case(tp=2, ep=2, compiled=True, ac="selective", steps=1, fp8="delayed")
    shallow, deep = assert_equal([how, replace(how, model=replace(MODEL, layers=6))], backend="aot_eager")
    assert shallow == deep


@pytest.mark.slow
def test_compiled_code() -> None:
    """Inductor: generated C++, whose collectives work in place (eager tracing does not show what goes wrong there)."""
    assert_equal(
        [
            case(tp=2, ac="selective", compiled=True, steps=2),
            case(tp=2, compiled=True, ac="full", steps=1),
            case(tp=2, ep=2, compiled=True, ac="selective", keep=("attention", "experts"), share=0.5, steps=1),
            case(tp=2, ep=2, compiled=True, ac="selective", keep=ALL, steps=1),
            case(tp=2, ep=2, compiled=True, ac="selective", chunks=2, steps=1),
            case(ep=2, compiled=True, chunks=2, steps=1, moe=replace(MOE, form="lean")),
            case(tp=2, ep=2, compiled=True, fp8="delayed", ac="selective", steps=2),
            case(tp=2, ep=2, compiled=True, fp8="current", steps=1, moe=replace(MOE, form="lean")),
            case(tp=2, ep=2, compiled=True, fp8="mxfp8", steps=1),
        ],
        backend="inductor",
    )

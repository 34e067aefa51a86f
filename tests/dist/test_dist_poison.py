"""The comparison is worth something: one thing is broken on purpose, and it must fail, by far."""

from __future__ import annotations

from dataclasses import replace

from dist_cases import MODEL, MOE, case, check_cases
from dist_harness import run_distributed

BOUND = 1e-10
FEW_KV = replace(MODEL, kv_heads=1)


def test_poisons_are_found() -> None:
    cases = [
        case(ep=2, steps=1, poison="expert_scale"),
        case(tp=2, steps=1, model=FEW_KV, poison="kv_sum"),
        case(tp=2, ep=2, poison="stale_index"),
        case(tp=2, ep=2, steps=1, poison="gate_gradient"),
        case(tp=2, poison="drifted_copy"),
        case(ep=2, steps=1, moe=replace(MOE, form="lean"), poison="lean_gates"),
    ]
    results = run_distributed(4, check_cases, cases)[0]
    for c, (name, errors) in zip(cases, results, strict=True):
        print(f"{name:60s} {errors}")
        assert not errors.within(1e4 * BOUND) or c.poison == "drifted_copy", f"{name} went unnoticed: {errors}"
    scale, kv, stale, gate, drifted, lean = (errors for _, errors in results)
    # Most faults leave the loss untouched: only gradients tell.
    assert scale.loss < BOUND
    assert ".experts." in scale.grad_name
    assert kv.loss < BOUND
    assert kv.grad_name.endswith(("key.weight", "value.weight"))
    assert not kv.copies_agree
    assert stale.loss > 1e-4
    assert gate.loss < BOUND
    assert "router" in gate.grad_name or gate.grad > 1e-3
    assert not drifted.copies_agree
    assert lean.loss < BOUND
    assert lean.grad > 1e-3

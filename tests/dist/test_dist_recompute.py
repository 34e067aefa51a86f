"""What backward does not run again, counted op by op and in FLOPs; and every policy gives the gradients of no checkpointing.

The text's refiner and what lies outside of blocks is never checkpointed: it is counted in both.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch
from dist_cases import DENSE, TOKEN_CHOICE, Case, batch, case, check_cases, forward, full_state, make_model
from dist_harness import RankError, run_distributed
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ecdit_train.parallel.apply import parallelize
from ecdit_train.parallel.mesh import make_mesh
from ecdit_train.parallel.recompute import ATTENTION, DECISIONS, PRODUCTS, checkpointed

KINDS = ("attention", "projections", "feed_forward", "experts")
LAYERS, SPARSE = 4, 2
PRODUCTS_OF = {"attention": 0, "projections": 8 * LAYERS, "feed_forward": 2 * (LAYERS - SPARSE), "experts": 2 * SPARSE}
"""Query, key, value and output of self- and cross-attention; up and down."""
ALWAYS = LAYERS + SPARSE
"""Repeated in every mode: a block's modulation and a router's scores, both small; what was decided by scores is not."""


class Ops(TorchDispatchMode):
    """How often each op runs."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def run(c: Case) -> tuple[Counter[str], int, dict[str, torch.Tensor]]:
    """One forward and backward in one process: ops, FLOPs, gradients."""
    model = make_model(c).to(getattr(torch, c.dtype))
    parallelize(model, mesh=make_mesh(c.parallel, device_type="cpu", world=1), parallel=c.parallel, precision="fp32")
    model.load_state_dict(full_state(c))
    with FlopCounterMode(display=False) as flops, Ops() as ops:
        forward(model, batch(0), group_tokens=c.group_tokens)[0].backward()
    return ops.count, flops.get_total_flops(), {n: p.grad for n, p in model.named_parameters()}


def products(count: Counter[str]) -> int:
    return sum(count[name] for name in PRODUCTS)


@pytest.fixture(scope="module")
def plain():
    return run(case(dtype="float32"))


@pytest.mark.parametrize(
    "keep", [(), *((kind,) for kind in KINDS), ("attention", "projections"), ("feed_forward", "experts"), KINDS]
)
def test_what_is_kept_is_not_repeated_and_what_is_not_is(keep, plain):
    count, _, grads = run(case(ac="selective", keep=keep, dtype="float32"))
    again = sum(n for kind, n in PRODUCTS_OF.items() if kind not in keep)
    assert products(count) - products(plain[0]) == again + ALWAYS
    attention = sum(count[name] - plain[0][name] for name in ATTENTION - PRODUCTS if name.startswith("aten::_scaled"))
    assert attention == (0 if "attention" in keep else 2 * LAYERS)
    assert all(count[name] == plain[0][name] for name in DECISIONS)
    assert all(torch.equal(g, plain[2][n]) for n, g in grads.items())


def test_full_repeats_all_products_and_no_decision(plain):
    count, _, grads = run(case(ac="full", dtype="float32"))
    assert products(count) - products(plain[0]) == sum(PRODUCTS_OF.values()) + ALWAYS
    assert all(count[name] == plain[0][name] for name in DECISIONS)
    assert count["aten::topk"] == SPARSE
    assert all(torch.equal(g, plain[2][n]) for n, g in grads.items())


def test_flops_fall_with_what_is_kept_to_those_of_no_checkpointing(plain):
    order = [(), ("experts",), ("experts", "feed_forward"), KINDS]  # torch counts no FLOPs of the CPU's fused attention
    flops = [run(case(ac="selective", keep=keep, dtype="float32"))[1] for keep in order]
    assert all(a > b for a, b in pairwise(flops))
    assert plain[1] < flops[-1] < 1.02 * plain[1]


@pytest.mark.parametrize(("share", "dense", "sparse"), [(1.0, 2, 2), (0.5, 1, 1), (0.1, 1, 1)])
def test_a_share_of_the_blocks_is_repeated(share, dense, sparse, plain):
    count, _, grads = run(case(ac="selective", share=share, dtype="float32"))
    assert products(count) - products(plain[0]) == 9 * (dense + sparse) + 2 * dense + 3 * sparse
    assert all(torch.equal(g, plain[2][n]) for n, g in grads.items())


def test_the_share_is_even_over_the_depth():
    assert checkpointed(4, share=1.0) == {0, 1, 2, 3}
    assert checkpointed(8, share=0.5) == {1, 3, 5, 7}
    assert checkpointed(0, share=0.5) == frozenset()
    for blocks in range(1, 30):
        for share in (0.05, 0.3, 0.5, 0.8, 1.0):
            chosen = sorted(checkpointed(blocks, share=share))
            assert len(chosen) == max(1, round(share * blocks))
            gaps = {b - a for a, b in pairwise(chosen)}
            assert not gaps or max(gaps) - min(gaps) <= 1


def test_what_is_written_over_after_it_was_kept_is_found():
    """In place on a kept result: the recomputation would go on with another number, and the loss would not tell."""
    c = case(ac="selective", keep=("feed_forward",), dtype="float32")
    model = make_model(c)
    down = model.blocks[0].feed_forward.down
    down.forward = lambda x, f=down.forward: f(x).mul_(2.0)
    parallelize(model, mesh=make_mesh(c.parallel, device_type="cpu", world=1), parallel=c.parallel, precision="fp32")
    model.load_state_dict(full_state(c))
    with pytest.raises(RuntimeError, match=r"aten::mul_ writes over a result that was kept for backward"):
        forward(model, batch(0), group_tokens=c.group_tokens)


def test_a_sum_over_ranks_in_place_on_a_kept_product_is_refused() -> None:
    """Every gradient was wrong before it was: the sum was taken of sums, behind the right loss."""
    c = case(tp=2, steps=1, ac="selective", keep=("projections",), moe=DENSE, poison="kept_product_summed_in_place")
    with pytest.raises(RankError, match=r"c10d::allreduce_ writes over a result that was kept for backward"):
        run_distributed(2, check_cases, [c])


def test_every_policy_on_ranks() -> None:
    """With FSDP's hooks and the exchange inside: loss, every gradient, the clipped norm and the next weights."""
    axes = {"tp": 2, "ep": 2, "steps": 2}
    cases = [
        *(case(**axes, ac="selective", keep=(kind,)) for kind in KINDS), case(**axes, ac="selective", keep=KINDS, chunks=2),
        case(ep=4, steps=2, ac="selective", keep=("attention", "experts"), share=0.5, microbatches=2),
        case(rep=2, ep=2, steps=2, ac="full", share=0.5), case(ep=2, steps=2, ac="selective", keep=("experts",), moe=TOKEN_CHOICE),
    ]  # fmt: skip
    for name, errors in run_distributed(4, check_cases, cases, timeout=280)[0]:
        print(f"{name:80s} {errors}")
        assert errors.within(1e-10), f"{name}: {errors}"

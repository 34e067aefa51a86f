"""8-bit products in the plan: typed out by hand for one layout, and the casts counted op by op on the real product.

EC-DiT-XL-8E as in test_plan_closed_forms.py: 28 blocks, 14 of them sparse; d = 1152, 18 heads, 6 kv heads, hidden 4608, 128 tokens
of text, 1536 wide, 128 tokens an image, f_c = 2.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
import torch

from benchmarks.outside_products import Traffic
from ecdit_train.model.fp8 import E4M3, Fp8Product, amax_of, block_scale, quantise
from ecdit_train.plan import cost as cost_
from ecdit_train.plan import estimate, flops, layout, low_precision, parameters, search, traffic

BASE = ("parallel=single", "parallel.compile=false", "encoders=shards", "moe.form=plain", "train.microbatch=64")
FP8 = (*BASE, "train.precision=fp8")
T, TEXT = 64 * 128, 64 * 128
D, KV, Y, H = 1152, 384, 1536, 4608
ATTENTION = [(T, D, D), (T, D, KV), (T, D, KV), (T, D, D), (T, D, D), (TEXT, Y, D), (TEXT, Y, D), (T, D, D)]
DENSE = [(T, D, H), (T, H, D)]
EXPERTS = [(2 * T, D, H), (2 * T, H, D)]
"""(rows, width, out) of a block's products on one rank."""


def step_of(cfg, world=8):
    """(layout, everything that it costs)."""
    at = layout.resolve(cfg, world=world)
    return at, cost_.cost(cfg, parameters.count(cfg), at)


def eight_bit_flops():
    """Of one microbatch's forward."""
    return sum(2 * r * k * o for r, k, o in 28 * ATTENTION + 14 * DENSE + 14 * EXPERTS)


def test_products(cfg_of):
    """Forward and twice backward of 64 microbatches over all ranks; twice as fast, and MFU is stated against bf16's peak."""
    cfg, wide = cfg_of("ec_dit_xl_8e", *FP8), cfg_of("ec_dit_xl_8e", *BASE)
    (at, low), (_, high) = step_of(cfg), step_of(wide)
    assert at.microbatches * at.world == 64
    assert low.flops.in_8_bits == 3 * 64 * eight_bit_flops()
    assert low.flops.model == high.flops.model
    assert high.flops.in_8_bits == high.step_time.casts == 0
    rest = low.flops.model - low.flops.in_8_bits
    assert low.step_time.products == pytest.approx((low.flops.in_8_bits / 1.979e15 + rest / 0.989e15) / 0.65 / 8)
    assert low.step_time.mfu == pytest.approx(low.flops.model / (8 * 0.989e15 * low.step_time.seconds))


@pytest.mark.parametrize(
    "keep", [(), ("attention",), ("projections",), ("feed_forward",), ("experts",), ("projections", "experts")]
)
def test_products_that_are_repeated(cfg_of, keep):
    words = (*FP8, "parallel.activation_checkpointing=selective", f"parallel.keep=[{','.join(keep)}]")
    cfg = cfg_of("ec_dit_xl_8e", *words)
    again = flops.of_layout(cfg, layout.resolve(cfg, world=8))
    parts = {"projections": 28 * ATTENTION, "feed_forward": 14 * DENSE, "experts": 14 * EXPERTS}
    left = [product for name, made in parts.items() if name not in keep for product in made]
    assert again.recompute_in_8_bits == 64 * sum(2 * r * k * o for r, k, o in left)
    assert again.recompute_in_8_bits < again.recompute


@pytest.mark.parametrize("backend", ["scaled_mm", "emulated", "mxfp8"])
def test_casts_are_what_the_product_moves(backend):
    """Every op of a forward and a backward, with its real tensors; the product itself aside. A linear layer's matrix and a stacked
    one are copied at different moments."""
    recipe = "mxfp8" if backend == "mxfp8" else "current"
    how = Fp8Product(recipe, stack=2, backend="scaled_mm" if backend == "scaled_mm" else "emulated")
    sizes = [(256, 128, 64), (128, 256, 64), (64, 128, 256), (256, 256, 256)]
    forward, backward = [], []
    for rows, width, out in sizes:
        x = torch.randn(2, rows, width, dtype=torch.bfloat16, requires_grad=True)
        w = torch.randn(2, width, out, dtype=torch.bfloat16, requires_grad=True)
        with Traffic() as there:
            y = how(x, w)
        dy = torch.ones_like(y)
        with Traffic() as back:
            torch.autograd.grad(y, (x, w), dy)
        forward.append(moved(there))
        backward.append(moved(back))
    values = np.array([[2 * r * k, 2 * k * o, 2 * r * o] for r, k, o in sizes], dtype=float)
    found = low_precision.MOVED[backend]
    there, back = (np.linalg.lstsq(values, np.array(each), rcond=None)[0] for each in (forward, backward))
    assert there == pytest.approx([found.x, found.w, found.y], abs=3)
    assert back == pytest.approx([found.x_back, found.w_back, found.y_back], abs=3)
    both = [found.x + found.x_back, found.w + found.w_back, found.y + found.y_back]
    assert there + back == pytest.approx(both, rel=0.01, abs=0.5)


def moved(seen):
    """Bytes; a copy into a result reads its source alone, which is as large."""
    copied = seen.bytes["aten::copy_"] / 3
    return sum(count for name, count in seen.bytes.items() if name != "aten::_scaled_mm") - copied


def test_casts_of_a_step(cfg_of):
    """Operands forward and backward, in every microbatch; of experts over ranks each holds one matrix of eight, cast
    for each of four parts. A repeated block casts again what its forward did."""
    cfg = cfg_of("ec_dit_xl_8e", *FP8, "parallel.ep=8", "parallel.overlap_chunks=4")
    at, found = step_of(cfg)
    x = sum(r * k for r, k, _ in 28 * ATTENTION + 14 * DENSE + 14 * EXPERTS)
    w = sum(k * o for _, k, o in 28 * ATTENTION + 14 * DENSE) + 4 * sum(k * o for _, k, o in 14 * EXPERTS)
    y = sum(r * o for r, _, o in 28 * ATTENTION + 14 * DENSE + 14 * EXPERTS)
    forward, backward = 67 * (x + w) + 4 * y, 6 * x + 67 * w + 69 * y
    assert low_precision.cast_bytes(cfg, at) == 8 * (forward + backward)
    assert found.step_time.casts == pytest.approx(8 * (forward + backward) / 3e12)
    again = dataclasses.replace(at, activation_checkpointing="full")
    assert low_precision.cast_bytes(cfg, again) == 8 * (2 * forward + backward)


@pytest.mark.parametrize(("recipe", "calls"), [("current", 3), ("delayed", 3), ("mxfp8", 0)])
def test_agreements(cfg_of, recipe, calls):
    """Ten linear layers of a dense block, eight of a sparse one; two tp ranks, 16 microbatches of 64 images."""
    words = (*FP8, f"train.fp8_recipe={recipe}", "train.fp8_backend=emulated", "parallel.tp=2")
    cfg = cfg_of("ec_dit_xl_8e", *words)
    at = layout.resolve(cfg, world=8)
    flows = {flow.purpose: flow for flow in traffic.tensor_parallel(cfg, at)}
    if not calls:
        assert "scales of 8-bit operands" not in flows
        return
    found = flows["scales of 8-bit operands"]
    assert (found.kind, found.ranks, found.calls) == ("all_reduce", 2, 16 * calls * 14 * (10 + 8))
    assert found.message == 4 * found.calls
    assert found.latency(cfg.cluster) == pytest.approx(found.calls * (10e-6 + 2 * 1.9e-6))


def test_memory_of_eight_bits(cfg_of):
    """What rounding needs beside the largest operand (rows of two experts a token before the last product, 9.6 GB), and 16
    magnitudes of 3 operands of each of 28 * 8 + 14 * 2 + 14 * 16 matrices."""
    cfg, wide = cfg_of("ec_dit_xl_8e", *FP8, "train.fp8_recipe=delayed"), cfg_of("ec_dit_xl_8e", *BASE)
    (at, low), (_, high) = step_of(cfg), step_of(wide)
    assert low_precision.workspace(cfg, at) == 13 * 2 * T * H
    assert low.memory.fp8_history == 192 * (28 * 8 + 14 * 2 + 14 * 16)
    assert high.memory.fp8_history == 0
    more = low_precision.more_kept(cfg, at)
    rows = T * D
    assert more.common == (3 + 1 + 1 + 1) * rows + 2 * TEXT * Y - 2 * 2 * rows
    assert more.dense == (1 + 4) * rows - (1 + 4) * 2 * rows
    assert more.sparse == 2 * (1 + 4) * rows - 2 * (1 + 4) * 2 * rows
    assert more.outside == -2 * TEXT * Y


def test_a_lean_layer(cfg_of):
    """It keeps what it keeps in bf16; W is cast once a pass and not for every part of an exchange, its rows twice."""
    words = (*FP8, "parallel.ep=8", "parallel.overlap_chunks=4")
    cfg = cfg_of("ec_dit_xl_8e", *words)
    at = layout.resolve(cfg, world=8)
    lean = dataclasses.replace(at, form="lean")
    assert low_precision.more_kept(cfg, lean).sparse == 0
    rows, matrices = 2 * T * (D + H), D * H + H * D
    difference = low_precision.cast_bytes(cfg, lean) - low_precision.cast_bytes(cfg, at)
    assert difference == 8 * 14 * (67 * rows - 3 * 2 * 67 * matrices)
    blocks = cfg_of("ec_dit_xl_8e", *words, "train.fp8_recipe=mxfp8", "train.fp8_backend=emulated")
    difference = low_precision.cast_bytes(blocks, lean) - low_precision.cast_bytes(blocks, at)
    assert difference == pytest.approx(-8 * 14 * 3 * (99.7 + 105.7) * matrices)


@pytest.mark.parametrize("recipe", ["current", "mxfp8"])
def test_compiled_casts_pass_over_a_value_once(recipe):
    """What torch.compile traces as one graph each reads its inputs and writes its results. For the operand's largest magnitude and
    its rounding together: 5 bytes a value; with blocks 13, as each value's scale goes out and in again."""
    seen = []

    def compiler(graph, inputs):
        def call(*given):
            out = graph(*given)
            seen.append(sum(t.nbytes for t in (*given, *out) if isinstance(t, torch.Tensor)))
            return out

        return call

    compiled = functools.partial(torch.compile, dynamic=True, backend=compiler)
    t = torch.randn(1, 256, 512, dtype=torch.bfloat16)
    if recipe == "mxfp8":
        quantised = compiled(quantise)(t, compiled(block_scale)(t, E4M3, along=2), E4M3)
    else:
        quantised = compiled(quantise)(t, compiled(amax_of)(t)[:, None, None], E4M3)
    assert quantised.values.shape == t.shape
    assert len(seen) == 2
    assert sum(seen) / t.numel() == pytest.approx(
        low_precision.FUSED["mxfp8" if recipe == "mxfp8" else "scaled_mm"], rel=1e-3
    )


def test_compiled_casts_of_a_step(cfg_of):
    """Where matrices are wide, eight bits pay on an H100 when casts are compiled."""
    cfg = cfg_of("ec_dit_xl_8e", *FP8, "parallel.compile=true")
    at = step_of(cfg)[0]
    x, w, y = (sum(n * sizes[i] for n, *sizes in totals()) for i in range(3))
    assert low_precision.cast_bytes(cfg, at) == 8 * (5 * (x + w) + 4 * y + 6 * x + 5 * w + 7 * y)
    assert low_precision.workspace(cfg, at) == 2 * T * H
    for words, faster in (((), True), (("parallel.compile=false", "moe.form=plain"), False)):
        low, high = (
            step_of(cfg_of("ec_dit_3xl_32e", *words, f"train.precision={kind}"), world=64)[1].step_time.seconds
            for kind in ("fp8", "bf16")
        )
        assert (low < high) == faster


def totals():
    """(blocks, values of x, of W, of y) of every product."""
    for blocks, products, stack in ((28, ATTENTION, 1), (14, DENSE, 1), (14, EXPERTS, 8)):
        for r, k, o in products:
            yield blocks, r * k, stack * k * o, r * o


def test_a_search_finds_what_the_rules_let_run(cfg_of):
    """It keeps the precision, and what it found is no slower than what was asked for."""
    cfg = cfg_of("ec_dit_xl_8e", *FP8)
    best = search.best(cfg, parameters.count(cfg), world=8)
    assert best.step_time.seconds <= step_of(cfg)[1].step_time.seconds
    assert best.step_time.casts > 0
    assert not any(word.startswith("train.precision") for word in search.overrides(cfg, best.layout))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "casts to 8 bits take"),
        (("cluster.peak_fp8_flops=0",), "cluster.peak_fp8_flops = 0"),
        (("train.fp8_backend=emulated",), "emulated 8-bit products"),
        (("cluster.memory_bandwidth=1e14",), None),
    ],
)
def test_what_a_plan_says_of_it(cfg_of, words, said):
    """A machine whose memory is 30 times as fast would gain by it."""
    cfg = cfg_of("ec_dit_xl_8e", *FP8, *words)
    found = [line for line in estimate(cfg, world=8).warnings if "8-bit" in line or "8 bits" in line]
    assert len(found) == (said is not None)
    assert said is None or found[0].startswith(said)
    products = step_of(cfg)[1].step_time.products
    as_bf16 = step_of(cfg_of("ec_dit_xl_8e", *BASE))[1].step_time.products
    assert (
        (products < 0.7 * as_bf16) if said in (None, "casts to 8 bits take") else (products == pytest.approx(as_bf16))
    )

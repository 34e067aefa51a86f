"""The plan's newer quantities, typed out by hand for one layout each: no formula of the plan is called for what is expected.

EC-DiT-XL-8E: 28 blocks, 14 of them sparse; d = 1152, 18 heads, 6 kv heads, hidden 4608, text 128 x 1536 of 2048 channels,
128 tokens an image, f_c = 2, bf16. M-64E: 38 blocks, 19 sparse, d = 3072, 48 heads, 12 kv heads, hidden 12288.
"""

from __future__ import annotations

import pytest

from ecdit_train.plan import cost as cost_
from ecdit_train.plan import flops, layout, memory, parameters, traffic

XL_EXPERTS = 8 * 2 * 1152 * 4608
"""Parameters of the experts of one block."""
XL_SPARSE = 2 * 1152 * 1152 + 2 * 1152 * 384 + 2 * 1152 * 1152 + 2 * 1536 * 1152 + 2 * 1152 + 3 * 1152**2 + 3 * 1152
"""A sparse block without experts and router: attentions, the text's norm, modulation."""
XL_DENSE = XL_SPARSE + 2 * 1152 * 4608
XL_ROUTER = 1152 * 8


def of(cfg, world):
    at = layout.resolve(cfg, world=world)
    counted = parameters.count(cfg)
    return at, counted, {flow.purpose: flow for flow in traffic.per_step(cfg, counted, at)}


BASE = ("parallel=single", "parallel.compile=true", "encoders=shards", "moe.form=plain")


def test_lean_activations(cfg_of):
    """XL on 8 ranks with ep = 8, 32 images: per block 7 + 2 + 2/3 + 2 + 2 + 2 rows of attention and norms; dense 9; sparse rows
    before GELU and as brought for two experts a token, and the output."""
    cfg = cfg_of("ec_dit_xl_8e", *BASE, "parallel.ep=8", "train.microbatch=32", "moe.form=lean")
    at, _, _ = of(cfg, 8)
    tokens = 32 * 128
    row = tokens * 1152 * 2
    every = (7 + 2 + 2 / 3 + 2 + 2 + 2) * row + 2 * tokens * 4 * 18 + 32 * 12 * 1152 * 2
    dense, sparse = 9 * row, (2 * (4 + 1) + 1) * row + tokens * (8 * 8 + 16 * 2)
    outside = 32 * 128 * 2 * ((16 * 2 + 3) * 1536 + 2048) + 3 * row
    assert cfg.model.text_refiner_layers == 2
    assert memory.activations(cfg, at).kept == pytest.approx(28 * every + 14 * dense + 14 * sparse + outside, rel=1e-3)
    alone = cfg_of("ec_dit_xl_8e", *BASE, "train.microbatch=32", "moe.form=lean")
    fewer = memory.activations(cfg, at).kept - memory.activations(alone, of(alone, 8)[0]).kept
    assert fewer == pytest.approx(14 * 2 * row)  # no exchange brings rows


KEPT_ROWS = {
    # In every block (attention, projections) or a dense one (feed_forward), over what its input takes.
    "attention": (2, 2),
    "projections": (1 + 2 / 3 + 1 + 1 + 2 + 1, 1 + 2 / 3 + 1 + 1 + 2 + 1),
    "feed_forward": (4 + 1, 0),
    "experts": (0, 2 * (4 + 1)),
}
AGAIN = {
    # FLOPs of a token's forward: scores and sums over 128 tokens and 128 of the text; the projections, those of the text too.
    "attention": 28 * (4 * 128 * 1152 + 4 * 128 * 1152),
    "projections": 28 * (2 * (2 * 1152**2 + 2 * 1152 * 384) + 2 * 2 * 1152**2 + 2 * 2 * 1536 * 1152),
    "feed_forward": 14 * 2 * 2 * 1152 * 4608,
    "experts": 14 * 2 * 2 * 2 * 1152 * 4608,
}


@pytest.mark.parametrize("kind", KEPT_ROWS)
def test_what_a_kind_costs_and_saves(cfg_of, kind):
    """One kind more kept by all blocks: rows of memory, and FLOPs that are not repeated."""
    words = (*BASE, "parallel.activation_checkpointing=selective", "train.microbatch=32")
    without, with_it = cfg_of("ec_dit_xl_8e", *words), cfg_of("ec_dit_xl_8e", *words, f"parallel.keep=[{kind}]")
    at, kept = (layout.resolve(cfg, world=8) for cfg in (without, with_it))
    tokens = 32 * 128
    dense, sparse = KEPT_ROWS[kind]
    more = 14 * (dense + sparse) * tokens * 1152 * 2 + (28 * 2 * tokens * 4 * 18 if kind == "attention" else 0)
    found = memory.activations(with_it, kept).kept - memory.activations(without, at).kept
    assert found == pytest.approx(more, rel=1e-3)
    less = flops.of_layout(without, at).recompute - flops.of_layout(with_it, kept).recompute
    assert less == pytest.approx(4096 * 128 * AGAIN[kind], rel=1e-3)


def test_half_of_the_blocks(cfg_of):
    """7 dense and 7 sparse blocks of 14 each keep their input alone and are worked through again."""
    words = (*BASE, "parallel.activation_checkpointing=selective", "train.microbatch=32")
    all_, half, none = (
        cfg_of("ec_dit_xl_8e", *words, "parallel.checkpoint_blocks=1"),
        cfg_of("ec_dit_xl_8e", *words, "parallel.checkpoint_blocks=0.5"),
        cfg_of("ec_dit_xl_8e", *words, "parallel.activation_checkpointing=none"),
    )
    kept = [memory.activations(cfg, layout.resolve(cfg, world=8)).kept for cfg in (all_, half, none)]
    assert kept[1] == pytest.approx((kept[0] + kept[2]) / 2, rel=1e-3)
    again = [flops.of_layout(cfg, layout.resolve(cfg, world=8)).recompute for cfg in (all_, half, none)]
    a_token = sum(AGAIN.values()) + 14 * 2 * 1152 * 8 + 28 * 2 * 3 * 1152**2 / 128
    assert again == pytest.approx([4096 * 128 * a_token, 4096 * 128 * a_token / 2, 0.0], rel=1e-3)


@pytest.mark.parametrize(
    ("reshard", "dense_calls", "expert_calls"), [("all", 2, 2), ("dense", 2, 1), ("experts", 1, 2), ("none", 1, 1)]
)
def test_gathers_and_what_stays(cfg_of, reshard, dense_calls, expert_calls):
    """XL on 8 ranks, experts sharded like the rest, two microbatches; root gathered once in each."""
    cfg = cfg_of("ec_dit_xl_8e", *BASE, "train.microbatch=256", f"parallel.reshard_after_forward={reshard}")
    at, counted, flows = of(cfg, 8)
    assert at.microbatches == 2
    assert flows["weights, dense block"].calls == 14 * dense_calls * 2
    assert flows["weights, router"].calls == 14 * dense_calls * 2
    assert flows["weights, experts"].calls == 14 * expert_calls * 2
    assert flows["weights, experts"].message == 14 * expert_calls * 2 * XL_EXPERTS * 2
    root = flows["weights, root"].message / 2
    dense = (XL_DENSE + XL_SPARSE) * 2 + XL_ROUTER * 4
    stays = root + dense * (1 if dense_calls == 2 else 14) + XL_EXPERTS * 2 * (1 if expert_calls == 2 else 14)
    assert memory.estimate(cfg, counted, at).gathered == pytest.approx(stays)


@pytest.mark.parametrize(("when", "times"), [("step", 1), ("microbatch", 2)])
def test_reductions(cfg_of, when, times):
    """In fp32, of 8 ranks: whole gradients add up, or shards do."""
    cfg = cfg_of("ec_dit_xl_8e", *BASE, "train.microbatch=256", f"parallel.reduce_gradients={when}")
    at, counted, flows = of(cfg, 8)
    assert flows["gradients, experts"].calls == 14 * times
    assert flows["gradients, experts"].message == 14 * times * XL_EXPERTS * 4
    network = counted.network
    assert memory.estimate(cfg, counted, at).gradients == 4 * (network if when == "step" else network / 8)


@pytest.mark.parametrize(("replicated", "shards"), [(False, 4), (True, 2)])
def test_copies_of_experts(cfg_of, replicated, shards):
    """XL on 32 ranks in two copies of two nodes, ep = 8: an expert is sharded over 4 ranks, or over 2 with a copy of each shard."""
    words = (*BASE, "parallel.ep=8", "parallel.dp_replicate=2", f"parallel.replicate_experts={str(replicated).lower()}")
    cfg = cfg_of("ec_dit_xl_8e", *words, "train.microbatch=64")
    at, counted, flows = of(cfg, 32)
    here = XL_EXPERTS // 8
    assert flows["gradients, experts"].ranks == shards
    summed = flows.get("gradients of replicas, experts")
    if replicated:
        assert (summed.ranks, summed.calls, summed.message) == (2, 14, 14 * here / 2 * 4)
        assert summed.intra_node == 0 < summed.inter_node
    else:
        assert summed is None
    experts, rest = 14 * XL_EXPERTS, counted.network - 14 * XL_EXPERTS
    held = rest / 16 + experts / 8 / shards
    assert memory.estimate(cfg, counted, at).parameters == 4 * held


def test_hierarchical_exchange(cfg_of):
    """M-64E over 64 ranks on 8 nodes: all rows go to the rank of the node that takes them across, then across; the bytes between
    nodes are those of the flat way, in 7 messages for 56."""
    words = ("parallel=single", "parallel.compile=true", "parallel.ep=64", "train.microbatch=64", "moe.form=lean")
    flat, nodes = (cfg_of("ec_dit_m_64e", *words, f"parallel.exchange={way}") for way in ("flat", "hierarchical"))
    rows = 2 * 64 * 128
    message, gates = rows * 3072 * 2, rows * 4
    _, _, one = of(flat, 64)
    _, _, two = of(nodes, 64)
    sent = one["tokens to experts and back"]
    assert (sent.calls, sent.message) == (4 * 19, 4 * 19 * message)
    assert (sent.intra_steps, sent.inter_steps) == (7, 56)
    assert one["gates to experts and back"].message == 2 * 19 * gates
    inside, across = two["tokens to experts and back, inside"], two["tokens to experts and back, across"]
    assert (inside.ranks, across.ranks) == (8, 8)
    assert inside.message == across.message == sent.message
    assert inside.intra_node == sent.message * 7 / 8
    assert across.inter_node == pytest.approx(sent.inter_node)
    assert (inside.intra_steps, inside.inter_steps, across.intra_steps, across.inter_steps) == (7, 0, 0, 7)


def test_latency(cfg_of):
    """304 calls of M-64E's preset among 32 ranks of 4 nodes: 10 microseconds each, 7 hops of 1.9 and 24 of 4; a gather among 64
    ranks of 8 nodes goes 56 and 7 hops; an all-reduce goes up and down a tree."""
    cfg = cfg_of("ec_dit_m_64e")
    _, _, flows = of(cfg, 64)
    sent = flows["tokens to experts and back"]
    assert sent.latency(cfg.cluster) == pytest.approx(4 * 19 * 4 * (10e-6 + 7 * 1.9e-6 + 24 * 4e-6))
    root = flows["weights, root"]
    assert root.latency(cfg.cluster) == pytest.approx(10e-6 + 56 * 1.9e-6 + 7 * 4e-6)
    hybrid = cfg_of("ec_dit_xl_8e", *BASE, "parallel.dp_replicate=4", "train.microbatch=64")
    summed = of(hybrid, 32)[2]["gradients of replicas, root"]
    assert summed.latency(hybrid.cluster) == pytest.approx(10e-6 + 2 * 2 * 4e-6)


def test_copies_and_elementwise(cfg_of):
    """XL, experts on their ranks alone: gathering casts (4 + 2 bytes), reducing copies (2 + 4), both once. The lean form
    moves two values of width d more for each of two rows a token that it gathers again, none where rows were brought."""
    words = (*BASE, "parallel.ep=8", "train.microbatch=512", "parallel.reshard_after_forward=none")
    cfg, lean = cfg_of("ec_dit_xl_8e", *words), cfg_of("ec_dit_xl_8e", *words, "moe.form=lean")
    at, counted, _ = of(cfg, 8)
    shards = counted.network - 14 * XL_EXPERTS - 14 * XL_ROUTER
    experts = 14 * XL_EXPERTS / 8 * (6 + 6)
    routers = 14 * XL_ROUTER * (8 / 8 + 8 + 8)
    assert cost_.copied(cfg, counted, at) == pytest.approx(experts + routers + shards * (6 / 8 + 4 + 6))
    assert cost_.elementwise_bytes(lean, of(lean, 8)[0]) == cost_.elementwise_bytes(cfg, at)
    alone = (*BASE, "train.microbatch=512")
    cfg, lean = cfg_of("ec_dit_xl_8e", *alone), cfg_of("ec_dit_xl_8e", *alone, "moe.form=lean")
    more = cost_.elementwise_bytes(lean, of(lean, 8)[0]) - cost_.elementwise_bytes(cfg, of(cfg, 8)[0])
    assert more == pytest.approx(14 * 2 * 1152 * 2 * 2 * 512 * 128)

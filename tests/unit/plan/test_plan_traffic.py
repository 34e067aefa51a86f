"""Traffic: links of groups, the exchange formula, and the times of an independent estimate."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter

import pytest
import torch

from ecdit_train.model.dit import DiT
from ecdit_train.parallel.degrees import Degrees
from ecdit_train.parallel.tensor_parallel import PLAN
from ecdit_train.plan import flops, layout, memory, parameters, traffic
from ecdit_train.plan.cost import cost, step_time


def flows_of(cfg, world):
    at = layout.resolve(cfg, world=world)
    return at, traffic.per_step(cfg, parameters.count(cfg), at)


@pytest.mark.parametrize(
    ("name", "megabytes"), [("ec_dit_xl_8e", 38), ("ec_dit_xxl_8e", 50), ("ec_dit_3xl_8e", 75), ("ec_dit_m_64e", 101)]
)
def test_exchange_bytes_at_8192_tokens(cfg_of, name, megabytes):
    """Section 5: f_c t d 2 bytes per GPU, direction and layer."""
    cfg = cfg_of(name, "train.microbatch=64")
    at, _ = flows_of(cfg, 64)
    assert traffic.exchange_bytes(cfg, at) / 1e6 == pytest.approx(megabytes, rel=0.015)
    folded = dataclasses.replace(at, tp=2)
    assert traffic.exchange_bytes(cfg, folded) == traffic.exchange_bytes(cfg, at) / 2


@pytest.mark.parametrize(
    ("name", "world", "ep", "serial"),
    [
        ("ec_dit_xl_8e", 8, 8, 0.033),
        ("ec_dit_xl_32e", 16, 8, 0.016),
        ("ec_dit_xxl_32e", 32, 8, 0.015),
        ("ec_dit_xxl_32e", 32, 32, 0.115),
        ("ec_dit_3xl_32e", 64, 8, 0.012),
        ("ec_dit_3xl_32e", 64, 32, 0.095),
        ("ec_dit_m_64e", 32, 32, 0.230),
        ("ec_dit_m_64e", 64, 64, 0.134),
        ("ec_dit_m_64e", 128, 64, 0.067),
    ],
)
def test_serial_exchange_time(cfg_of, name, world, ep, serial):
    """Section 4's column: four exchanges per sparse layer, without block checkpointing."""
    cfg = cfg_of(
        name,
        f"parallel.ep={ep}",
        "parallel.activation_checkpointing=none",
        "parallel.keep=[]",
        "parallel.exchange=flat",
        "moe.form=plain",
        "train.microbatch=8",
        "parallel.overlap_chunks=1",
    )
    _, flows = flows_of(cfg, world)
    exchange = [f for f in flows if f.kind == "all_to_all"]
    found = sum(f.seconds(intra_bandwidth=4.5e11, inter_bandwidth=5e10) for f in exchange)
    assert found == pytest.approx(serial, rel=0.05)
    assert sum(f.calls for f in exchange) == 4 * (cfg.model.layers // 2) * (4096 // (world * 8))


@pytest.mark.parametrize(("mode", "calls"), [("none", 4), ("selective", 4), ("full", 6)])
def test_only_full_checkpointing_exchanges_again(cfg_of, mode, calls):
    words = (f"parallel.activation_checkpointing={mode}", "parallel.overlap_chunks=1")
    cfg = cfg_of("ec_dit_xl_8e", "train.microbatch=512", *words)
    _, flows = flows_of(cfg, 8)
    assert [f.calls for f in flows if f.kind == "all_to_all"] == [calls * 14]


@pytest.mark.parametrize(
    ("replicate", "shard", "tp", "ep"), [(1, 64, 1, 8), (2, 16, 2, 16), (4, 4, 4, 2), (1, 12, 2, 6)]
)
def test_groups_equal_the_rank_arithmetic(replicate, shard, tp, ep):
    """Members per node of rank 0's groups, counted over all ranks."""
    d = Degrees(world=replicate * shard * tp, dp_replicate=replicate, dp_shard=shard, tp=tp, ep=ep)
    at = layout.Layout(
        world=d.world,
        gpus_per_node=8,
        dp_replicate=replicate,
        dp_shard=shard,
        tp=tp,
        ep=ep,
        activation_checkpointing="none",
        overlap_chunks=1,
        reshard_after_forward="all",
        microbatch=8,
        microbatches=1,
    )
    ranks = range(d.world)
    groups = {
        "tp": [r for r in ranks if d.dense(r)[:2] == (0, 0)],
        "dp_shard": [r for r in ranks if d.dense(r)[::2] == (0, 0)],
        "dp_replicate": [r for r in ranks if d.dense(r)[1:] == (0, 0)],
        "ep": [r for r in ranks if d.sparse(r)[0] == 0],
        "edp": [r for r in ranks if d.sparse(r)[1] == 0],
        "world": list(ranks),
    }
    for axis, members in groups.items():
        group = at.group(axis)
        assert (group.size, group.per_node) == (len(members), sum(r < 8 for r in members)), axis


def test_what_leaves_a_rank(cfg_of):
    """All bytes sent are M (n - 1) / n for gathers and exchanges, twice that for all-reduces, however they split."""
    cfg = cfg_of("ec_dit_xl_8e", "parallel=tp2_ep8", "parallel.dp_replicate=2", "train.microbatch=16")
    _, flows = flows_of(cfg, 32)
    assert {f.kind for f in flows} == {"all_gather", "reduce_scatter", "all_reduce", "all_to_all", "broadcast"}
    for f in flows:
        passes = 2 if f.kind == "all_reduce" else 1
        assert f.intra_node + f.inter_node == pytest.approx(passes * f.message * (f.ranks - 1) / f.ranks), f
    assert all(f.inter_node == 0 for f in flows if f.axis in ("tp", "ep"))


@pytest.mark.parametrize(
    ("name", "words", "tp"), [("ec_dit_xl_8e", (), 2), ("dense_xl", ("model.kv_heads=3",), 9), ("dense_xl", (), 1)]
)
def test_agreement_counts_what_the_parallel_model_holds_alike(cfg_of, name, words, tp):
    """Against the real placements: every parameter that tensor parallelism leaves alone, and repeated kv heads."""
    cfg = cfg_of(
        name,
        "train.global_batch=4608",
        "train.microbatch=64",
        f"parallel.tp={tp}",
        "parallel.ep=1",
        "model.layers=2",
        *words,
    )
    at, flows = flows_of(cfg, 4 * tp)
    found = {f.ranks: f for f in flows if f.kind == "broadcast"}
    with torch.device("meta"):
        model = DiT(cfg.model, cfg.moe, channels=cfg.encoders.image.channels, text_features=cfg.encoders.text.width)
    copies = Counter()
    for key, p in model.named_parameters():
        split = any(re.fullmatch(rf"{pattern}\.(weight|bias)", key) for pattern, _ in PLAN)
        kv = re.search(r"self_attention\.(key|value)|cross_attention\.(key|value)", key) is not None
        if split and kv and p.shape[0] == cfg.model.kv_heads * 64 and tp > cfg.model.kv_heads:
            copies[tp // cfg.model.kv_heads] += p.numel() // cfg.model.kv_heads
        elif not split and ".experts." not in key:
            copies[tp] += p.numel()
    expected = {n: 4 * held / at.dp_shard for n, held in copies.items() if n > 1}
    assert {n: f.message for n, f in found.items()} == pytest.approx(expected)
    assert all(f.calls == 1 for f in found.values())
    assert all(f.inter_node == 0 for f in found.values() if f.ranks <= 8)


def test_expert_gradients_over_replicas(cfg_of):
    """Section 5, M-64E: EP8 costs 0.9 s a step between nodes, EP64 x 2 replicas 0.115 s."""
    times = {}
    for ep, world in ((8, 64), (64, 128)):
        cfg = cfg_of("ec_dit_m_64e", f"parallel.ep={ep}", "train.microbatch=32", "parallel.overlap_chunks=1")
        _, flows = flows_of(cfg, world)
        times[ep] = sum(f.inter_node / 5e10 for f in flows if f.purpose == "gradients, experts")
    # 4 bytes x 11.5B x 7/8; the facts leave the (n - 1) / n out. EP64: reduce-scatter only, the facts count an
    # all-reduce.
    assert times[8] == pytest.approx(0.9 * 7 / 8, rel=0.05)
    assert times[64] == pytest.approx(0.115 / 2, rel=0.05)


def test_step_time_under_the_facts_assumptions(cfg_of):
    """Section 4, M-64E on 64: 19.2 PFLOP, encoders precomputed, compute 466 ms, element-wise 57 ms, ceiling 58 %, 35
    % with everything exposed and full checkpointing (33 % in the table)."""
    cfg = cfg_of(
        "ec_dit_m_64e",
        "encoders=shards",
        "parallel=ep64",
        "parallel.overlap_chunks=1",
        "parallel.exchange=flat",
        *(f"cluster.{name}_latency=0" for name in ("call", "intra", "inter")),
    )
    at, flows = flows_of(cfg, 64)
    here = flops.per_step(cfg, checkpointing="none")
    scaled = dataclasses.replace(here, by_part={k: v * 19.2e15 / here.model for k, v in here.by_part.items()})
    state = memory.estimate(cfg, parameters.count(cfg), at)
    s = step_time(cfg, at, flops=scaled, memory=state, flows=flows, optimizer_flops=0.0, copied=0.0)
    assert s.products == pytest.approx(0.466, rel=0.01)
    assert s.elementwise == pytest.approx(0.057, rel=0.02)
    without_optimizer = 19.2e15 / 64 / 9.89e14 / (s.best - s.optimizer)
    assert without_optimizer == pytest.approx(0.58, abs=0.005)
    exposed = 19.2e15 / 64 / 9.89e14 / (s.seconds - s.optimizer)
    assert exposed == pytest.approx(0.45, abs=0.015)


def test_bounds_order(cfg_of):
    for words in (("ec_dit_m_64e",), ("ec_dit_3xl_32e",), ("ec_dit_xl_8e", "parallel=tp2_ep8"), ("shapes_tiny",)):
        cfg = cfg_of(*words)
        world = cfg.cluster.nodes * cfg.cluster.gpus_per_node
        s = cost(cfg, parameters.count(cfg), layout.resolve(cfg, world=world)).step_time
        assert 0 < s.best <= s.seconds <= s.worst * (1 + 1e-9)
        assert 0 < s.mfu <= s.mfu_ceiling < 1


def test_m_64e_by_fsdp_alone(cfg_of):
    """Section 5: 9.7 GB of experts per layer to gather, 1.5 s a step against 0.47 s of compute."""
    cfg = cfg_of("ec_dit_m_64e", "parallel=fsdp")
    _, flows = flows_of(cfg, 64)
    gather = next(f for f in flows if f.purpose == "weights, experts")
    assert gather.message / gather.calls / 1e9 == pytest.approx(9.7, rel=0.01)
    experts = [f for f in flows if f.purpose in ("weights, experts", "gradients, experts")]
    found = sum(f.seconds(intra_bandwidth=4.5e11, inter_bandwidth=5e10) for f in experts)
    # The facts gather at 370 GB/s of bus bandwidth and count 3 transfers of 2 bytes; ours are 2 of 2 bytes, one of 4.
    assert found == pytest.approx(1.5 * 4 / 3 * 370 / 450, rel=0.05)

"""Muon is the same optimizer on every layout: weights, copies and momentum, whoever owns which matrix.

The reference is Muon in one process, which tests/unit/train/test_muon.py holds to torch.optim.Muon bit for bit.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dist_cases import MODEL, MUON, case, check_cases, full_state, sharded
from dist_harness import run_distributed
from dist_runs import Layout, live
from dist_training import curves, resumed_elsewhere

from ecdit_train.parallel.mesh import make_mesh
from ecdit_train.parallel.owners import MatrixOwners, Sharding
from ecdit_train.parallel.placement import Box, pieces

FEW_KV = replace(MODEL, kv_heads=1)
LAYOUTS = {
    2: [{}, {"tp": 2}, {"ep": 2}],
    4: [{"tp": 2, "ep": 2}, {"rep": 2, "ep": 4}],
}
"""dp2, tp2, ep2; dp2 x tp2 with ep2, hybrid sharding 2 x 2 with ep4. Eight experts."""
MORE = [{}, {"rep": 2}]
"""Of four ranks."""
EXACT = {2: [{"tp": 2, "model": FEW_KV}], 4: [{"tp": 2, "ep": 4}]}
"""Also in float64; the first has a kv head that both ranks hold."""
WIDE = [{}, {"tp": 2, "ep": 4}, {"rep": 2, "tp": 2, "ep": 2}]


@pytest.mark.parametrize("world", LAYOUTS)
def test_weights_after_ten_steps(world):
    """In fp32 to 1e-5, in float64 (which only faults can leave) to 1e-10; all copies the same bits."""
    exact = [case(optim="muon", steps=2, **layout) for layout in EXACT[world]]
    ten = [case(optim="muon", steps=10, dtype="float32", **layout) for layout in LAYOUTS[world]]
    check(world, exact, ten)


@pytest.mark.slow
def test_four_ranks_without_experts_of_their_own():
    check(4, [], [case(optim="muon", steps=10, dtype="float32", **layout) for layout in MORE])


@pytest.mark.slow
def test_eight_ranks():
    check(
        8, [case(optim="muon", **w) for w in WIDE], [case(optim="muon", steps=10, dtype="float32", **w) for w in WIDE]
    )


def check(world: int, exact: list[Any], ten: list[Any]) -> None:
    results = run_distributed(world, check_cases, [*exact, *ten], timeout=240)[0]
    for c, (name, errors) in zip([*exact, *ten], results, strict=True):
        print(f"{name:60s} {errors}")
        bound = 1e-10 if c in exact else 1e-5
        assert errors.within(bound, grad=5 * bound), (name, errors)


def test_a_lost_piece_and_a_stale_copy_are_found():
    lost, stale = (case(tp=2, steps=2, optim="muon", poison=name) for name in ("lost_piece", "stale_copy"))
    for c in (lost, stale):
        ((name, errors),) = run_distributed(4, check_cases, [c])[0]
        print(f"{name:60s} {errors}")
        assert errors.weight > 1e-5, f"{name} went unnoticed: {errors}"
    assert not errors.copies_agree


def owners_here(runtime: Any, layouts: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """What the ranks say of the exchange on each layout, where it centres every matrix in many rounds and in one."""
    out = []
    for layout in layouts:
        c = case(**layout)
        mesh = make_mesh(c.parallel, device_type="cpu", world=runtime.world)
        (model, placements), full = sharded(c, mesh), full_state(c)
        ours = {n: p for n, p in model.named_parameters() if MUON.is_muons(n, placements[n].global_shape)}
        here = {(n, piece.box): piece.view for n, p in ours.items() for piece in pieces(p, placements[n])}
        sharding, how = Sharding(mesh=mesh, placements=placements), {"work": MUON.flops, "dtype": torch.float64}
        small, large = (MatrixOwners(ours, sharding, **how, round_bytes=size) for size in (ROUND, 2**30))

        def part(name: str, box: Box, here: Any = here) -> Any:
            held = next(held for n, held in here if n == name and held.meet(box) == box)
            return held.within(here[name, held], box)

        for owners in (small, large):
            owners.run(
                take=lambda n, box: part(n, box).clone(),
                compute=lambda x: x - x.mean(dim=(-2, -1), keepdim=True),
                give=lambda n, box, values: part(n, box).copy_(2 * values),
            )
        wrong = [
            n for (n, box), view in here.items()
            if not torch.allclose(view, 4 * box.of(full[n] - full[n].mean(dim=(-2, -1), keepdim=True)))
        ]  # fmt: skip
        mine = {
            "wrong": wrong,
            "held": sum(box.volume for _, box in here),
            "alone": sum(m.box.volume for m in small.alone),
            "owner": [m.owner for m in small.matrices],
            "holds": all(m.owner in {r for _, ranks in m.parts for r in ranks} for m in small.matrices),
            "work": [MUON.flops(*m.box.size[-2:]) for m in small.matrices],
            "elements": [m.box.volume for m in small.matrices],
            "largest": max(max(sum(r.out.received), sum(r.back.sent)) for r in small.rounds),
            "rounds": (len(small.rounds), len(large.rounds)),
            "bytes": (small.sent_bytes, large.sent_bytes),
            "to_owners": sum(sum(r.out.sent) for r in large.rounds),
            "received": sum(sum(r.back.received) for r in large.rounds),
        }
        out.append(runtime.all_gather_json(mine))
    return out


ROUND = 40_000


@pytest.mark.parametrize(("world", "layouts"), [(4, [{}, {"rep": 2}, {"tp": 2, "ep": 2}, {"ep": 4}]), (3, [{}])])
def test_what_travels(world, layouts):
    """Every matrix is seen whole. Every piece leaves once and comes back to each rank that holds it; rounds keep to their
    bound; work is shared. On three ranks no shard is even."""
    for ranks in run_distributed(world, owners_here, layouts)[0]:
        first = ranks[0]
        assert all(r["owner"] == first["owner"] for r in ranks)
        total, alone = sum(first["elements"]), sum(r["alone"] for r in ranks)
        assert sum(r["to_owners"] for r in ranks) == total - alone
        for r in ranks:
            assert r["wrong"] == []
            assert r["holds"]
            assert r["received"] == r["held"] - r["alone"]
            assert r["bytes"][0] == r["bytes"][1]
            assert 8 * r["largest"] <= max(ROUND, 8 * world * max(first["elements"]))
        assert first["rounds"][0] > first["rounds"][1] == 1
        load = [sum(w for w, o in zip(first["work"], first["owner"], strict=True) if o == n) for n in range(world)]
        assert max(load) < 1.2 * min(load), load
        assert alone > 0  # eight experts: whole wherever they lie


RUN = ("optim=muon", "optim.optimizer.ns_steps=1", "optim.warmup_steps=2", "train.steps=4", "train.global_batch=8",
       "train.microbatch=2", "checkpoint.every_steps=2", "moe.num_experts=4")  # fmt: skip
TP2_EP2 = Layout(world=4, words=("parallel.tp=2", "parallel.ep=2"))
OTHERS = {"dp4": Layout(world=4), "hsdp2x2": Layout(world=4, words=("parallel.dp_replicate=2",))}


def in_two_lives(here: Any, folder: Path, shards: Path, layout: Layout) -> tuple[Any, ...]:
    whole = live(here, folder / "whole", shards, (*RUN, *layout.words))
    first = live(here, folder / "parts", shards, (*RUN, *layout.words), stop_after=2)
    return whole, first, live(here, folder / "parts", shards, (*RUN, *layout.words))


def test_resumed_bitwise_and_loaded_by_other_layouts(tiny_shards, tmp_path):
    whole, first, second = run_distributed(4, in_two_lives, tmp_path, tiny_shards, TP2_EP2, timeout=240)[0]
    assert second.loaded == first.tensors
    assert second.tensors == whole.tensors
    kinds = {name.partition("/")[0] for name in whole.tensors}
    assert kinds == {"model", "ema", "optim.momentum_buffer", "optim.exp_avg", "optim.exp_avg_sq"}
    run = tmp_path / "whole"
    loaded = run_distributed(4, resumed_elsewhere, run, tiny_shards, OTHERS, RUN, timeout=240)[0]
    one = {"one": Layout(world=1)}
    loaded |= run_distributed(1, resumed_elsewhere, run, tiny_shards, one, RUN)[0]
    for name, digests in loaded.items():
        assert digests == whole.tensors, name
    alone = run_distributed(1, curves, tmp_path, tiny_shards, one, RUN)[0]["one"]
    errors = [abs(a - b) / b for a, b in zip(whole.losses, alone.losses, strict=True)]
    print(errors)
    assert max(errors) < 1e-3  # Newton-Schulz in bf16 flips roundings of one part in 256

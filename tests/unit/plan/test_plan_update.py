"""What an optimizer that works on whole matrices costs, as the plan says it, against plain arithmetic and a dry run."""

from __future__ import annotations

import math

import pytest
from test_plan_dry_run import by_name, dry_run

from ecdit_train.plan import layout, memory, parameters, traffic
from ecdit_train.plan.cost import cost

ITERATIONS = 5


def of(cfg, world):
    counted = parameters.count(cfg)
    return counted, layout.resolve(cfg, world=world)


def matrices(counted):
    """Of Muon in the default grouping, by a list of its own: (name, rows, columns) for each expert, too."""
    for name, shape in counted.shapes:
        if len(shape) > 1 and any(part in name for part in ("attention.", "feed_forward.")) and "router" not in name:
            for _ in range(shape[0] if len(shape) == 3 else 1):
                yield name, *shape[-2:]


def flops(rows, cols):
    m, n = min(rows, cols), max(rows, cols)
    return ITERATIONS * (2 * m * m * n + 2 * m**3 + 2 * m * m * n)


def test_adamw_sends_nothing_and_multiplies_nothing(cfg_of):
    counted, at = of(cfg_of("ec_dit_xl_8e"), 8)
    assert traffic.update(cfg_of("ec_dit_xl_8e"), counted, at) == traffic.Update(flops=0.0, calls=0, message=0.0)
    assert cost(cfg_of("ec_dit_xl_8e"), counted, at).step_time.optimizer_exchange == 0


def test_state_is_four_bytes_for_matrices_and_eight_for_the_rest(cfg_of):
    cfg = cfg_of("ec_dit_xl_8e", "optim=muon")
    counted, at = of(cfg, 8)
    muons = sum(rows * cols for _, rows, cols in matrices(counted))
    assert counted.state_bytes == 4 * muons + 8 * (counted.network - muons)
    assert memory.estimate(cfg, counted, at).optimizer == pytest.approx(counted.state_bytes / 8)


def test_experts_that_lie_whole_on_a_rank_stay_there(cfg_of):
    """ep 8: nothing of the experts travels; dense matrices leave once and come back to the one rank that holds a piece."""
    cfg = cfg_of("ec_dit_xl_8e", "optim=muon")
    counted, at = of(cfg, 8)
    said = traffic.update(cfg, counted, at)
    dense = sum(rows * cols for name, rows, cols in matrices(counted) if "experts" not in name)
    assert said.message == pytest.approx(
        2 * 2 * dense / 8, rel=0.05
    )  # bf16, there and back; FLOPs are balanced, not bytes
    assert said.flops == pytest.approx(sum(flops(r, c) for _, r, c in matrices(counted)) / 8, rel=0.01)
    flow = next(f for f in traffic.per_step(cfg, counted, at) if f.purpose == traffic.OPTIMIZER)
    assert (flow.kind, flow.ranks, flow.message) == ("all_to_all", 8, pytest.approx(said.message))
    fp32 = cfg_of("ec_dit_xl_8e", "optim=muon", "optim.optimizer.precision=fp32")
    assert traffic.update(fp32, parameters.count(fp32), at).message == 2 * said.message


def test_copies_get_the_result_too(cfg_of):
    """Hybrid sharding, two copies of each dense matrix: the way there is the same, the way back twice."""
    one, two = (cfg_of("ec_dit_xl_8e", "optim=muon", f"parallel.dp_replicate={n}") for n in (1, 2))
    messages = [traffic.update(c, *of(c, 8)).message for c in (one, two)]
    assert messages[1] / messages[0] == pytest.approx(1.5, rel=0.05)


def test_no_owner_is_busier_than_a_matrix_above_the_mean(cfg_of):
    cfg = cfg_of("dense_xl", "optim=muon", "train.microbatch=64")
    for world in (2, 8, 64):
        counted, at = of(cfg, world)
        work = [flops(r, c) for _, r, c in matrices(counted)]
        assert sum(work) / world <= traffic.update(cfg, counted, at).flops <= sum(work) / world + max(work)
    s = cost(cfg, counted, at).step_time
    assert s.optimizer_exchange > 0
    assert s.seconds >= s.optimizer + s.optimizer_exchange + s.products


def test_the_dry_run_makes_the_step(cfg_of):
    words = ("experiment=ec_dit_xl_8e", "optim=muon", "model.layers=4", "train.microbatch=32", "train.global_batch=256")
    tree = dry_run(*words, "parallel.tp=2", "parallel.ep=2", "parallel.dp_replicate=2", world=8)
    found = by_name(tree)
    assert abs(found["optimizer's all_to_all"]["relative"]) < 0.03
    assert abs(found["all_to_all"]["relative"]) < 0.005
    assert abs(found["optimizer"]["relative"]) < 0.005
    calls = [c["calls"] for c in tree["dry_run"]["collectives"] if c["kind"] == "optimizer's all_to_all"]
    assert calls == [2]
    assert math.isfinite(found["peak of forward and backward"]["relative"])

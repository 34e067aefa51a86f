"""When gradients are summed over ranks, whose weights are freed, and how many copies of experts there are: no number changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dist_cases import Case, batch, case, check_cases, forward, sharded
from dist_harness import run_distributed
from test_dist_grid import assert_equal
from torch.distributed.fsdp import FSDPModule

from ecdit_train.parallel.fsdp import accumulate
from ecdit_train.parallel.mesh import make_mesh

BOUND = 1e-10


def test_layouts_on_four_ranks() -> None:
    twice = {"steps": 2, "microbatches": 2, "reduce": "microbatch"}
    copies = {"rep": 2, "replicate": True}
    assert_equal(4, [
        case(**twice, ep=2), case(**twice, tp=2, ep=4), case(**twice, rep=2, ac="selective"),
        case(**twice, **copies), case(**copies, ep=2, steps=2), case(**copies, tp=2, ep=2, steps=2, optim="adamw"),
        case(**copies, ep=2, steps=2, microbatches=2, dtype="float64", reshard="dense"),
        case(**copies, ep=1, steps=2, optim="muon"),
        case(ep=2, steps=2, reshard="experts"), case(tp=2, ep=2, steps=2, reshard="dense", ac="selective"),
    ])  # fmt: skip


def test_production_type() -> None:
    """fp32, where torch divides once on a mesh of one: the other cases stand in for that (dist_cases.run_parallel)."""
    cases = [case(rep=2, ep=2, steps=2, replicate=True, dtype="float32"),
             case(rep=2, steps=2, replicate=True, reduce="microbatch", microbatches=2, dtype="float32")]  # fmt: skip
    for name, errors in run_distributed(4, check_cases, cases, timeout=280)[0]:
        assert errors.within(1e-5, grad=5e-5), f"{name}: {errors}"


@pytest.mark.slow
def test_layouts_on_eight_ranks() -> None:
    """Two copies of experts, each sharded over two ranks, with every other axis there is."""
    assert_equal(8, [case(rep=2, tp=2, ep=2, replicate=True, steps=2, reduce="microbatch", microbatches=2),
                     case(rep=2, ep=2, replicate=True, steps=2, optim="muon"),
                     case(rep=2, tp=2, ep=4, steps=1, exchange="hierarchical", replicate=True)])  # fmt: skip


def check_held(runtime: Any, c: Case) -> dict[str, list[int]]:
    """Elements in memory of gathered weights after a forward pass, and of whole gradients after a microbatch that is
    not the last, by part."""
    mesh = make_mesh(c.parallel, device_type="cpu", world=runtime.world)
    model, _ = sharded(c, mesh)
    part = {k: v.chunk(mesh.dp_size)[mesh.dp_rank] for k, v in batch(0).items()}
    held: dict[str, list[int]] = {"gathered": [0, 0], "whole": [0, 0], "sharded": [0, 0]}
    with accumulate(model, last=False, reduce=c.parallel.reduce_gradients):
        loss, _ = forward(model, part, group_tokens=c.group_tokens)
        for expert, params in units(model):
            for p in params:
                full = p._unsharded_param
                held["gathered"][expert] += full.untyped_storage().nbytes() // 4
        loss.backward()
    for expert, params in units(model):
        for p in params:
            whole = p.unsharded_accumulated_grad
            whole = p._unsharded_param.grad if whole is None else whole
            held["whole"][expert] += 0 if whole is None else whole.numel()
            held["sharded"][expert] += 0 if p.sharded_param.grad is None else p.sharded_param.grad.to_local().numel()
    return held


def units(model: torch.nn.Module) -> Any:
    """(experts or not, FSDP's parameters) of every unit inside of blocks: the root stays gathered by design."""
    for name, module in model.named_modules():
        if isinstance(module, FSDPModule) and name:
            for group in module._get_fsdp_state()._fsdp_param_groups:
                yield name.endswith(".experts"), group.fsdp_params


def check_all_held(runtime: Any, cases: list[Case]) -> list[dict[str, list[int]]]:
    return [check_held(runtime, c) for c in cases]


def test_whose_weights_are_freed_and_where_gradients_wait_for_the_last_microbatch():
    gathered = {"all": [0, 0], "dense": [0, 1], "experts": [1, 0], "none": [1, 1]}
    cases = [*(case(reshard=freed) for freed in gathered), case(), case(reduce="microbatch")]
    *freed, step, each = run_distributed(2, check_all_held, cases)[0]
    for held, wanted in zip(freed, gathered.values(), strict=True):
        assert [int(n > 0) for n in held["gathered"]] == wanted
    assert step["sharded"] == [0, 0] == each["whole"]
    for whole, shard in zip(step["whole"], each["sharded"], strict=True):
        assert 0 < whole <= 2 * shard < whole + 400  # two ranks; biases and routers are padded


def test_faults_of_copies_are_noticed() -> None:
    cases = [case(rep=2, ep=2, replicate=True, steps=1, poison="experts_counted_once"),
             case(rep=2, steps=1, microbatches=2, reduce="microbatch", poison="lost_microbatch")]  # fmt: skip
    results = [errors for _, errors in run_distributed(4, check_cases, cases)[0]]
    once, lost = results
    assert once.loss < BOUND
    assert once.norm > 1e-4, str(once)
    assert lost.loss < BOUND
    assert lost.grad > 1e-2, str(lost)

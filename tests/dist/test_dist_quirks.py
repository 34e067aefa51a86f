"""Faults of vendors that the code works round. Each test fails when its quirk is gone: then the
workaround may go too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from dist_cases import batch, case, forward, run_parallel, sharded
from dist_harness import run_distributed
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from ecdit_train.parallel import activation
from ecdit_train.parallel.mesh import make_mesh
from ecdit_train.parallel.placement import local


def gradient_on_mesh_of_one(runtime: Any, *, dtype: torch.dtype, force_sum: bool) -> float:
    mesh = init_device_mesh("cpu", (runtime.world, 1), mesh_dim_names=("a", "b"))
    layer = nn.Linear(4, 4, bias=False, dtype=dtype)
    fully_shard(layer, mesh=mesh["b"])
    layer.set_gradient_divide_factor(2.0)
    layer.set_force_sum_reduction_for_comms(force_sum)
    layer(torch.ones(1, 4, dtype=dtype)).sum().backward()
    return local(layer.weight.grad)[0, 0].item()


def fsdp_quirks(runtime: Any) -> dict[str, Any]:
    out: dict[str, Any] = {}
    out["right"] = gradient_on_mesh_of_one(runtime, dtype=torch.float32, force_sum=False)
    out["force_sum"] = gradient_on_mesh_of_one(runtime, dtype=torch.float32, force_sum=True)
    out["float64"] = gradient_on_mesh_of_one(runtime, dtype=torch.float64, force_sum=False)

    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("a",))
    layer = nn.Linear(4, 4, bias=False)
    fully_shard(layer, mesh=mesh)
    layer.set_gradient_divide_factor(4.0)
    try:
        layer(torch.ones(1, 4)).sum().backward()
        out["premul"] = "works"
    except RuntimeError as error:
        out["premul"] = str(error)
    return out


def test_fsdp_divides_twice_on_a_mesh_of_one() -> None:
    for out in run_distributed(2, fsdp_quirks):
        assert out["right"] == 0.5
        assert out["force_sum"] == 0.25  # why fsdp.py forces the sum only where edp > 1
        assert out["float64"] == 0.25  # why the tests' float64 cases set a factor of their own where edp = 1
        assert "PREMUL_SUM" in out["premul"]  # why it forces the sum at all


def norm_quirks(runtime: Any) -> dict[str, Any]:
    c = case(tp=2, ep=2, dtype="float32")
    mesh = make_mesh(c.parallel, device_type="cpu", world=runtime.world)
    model, _ = sharded(c, mesh)
    mine = {k: v.chunk(mesh.dp_size)[mesh.dp_rank] for k, v in batch(0).items()}
    forward(model, mine, group_tokens=c.group_tokens)[0].backward()
    out: dict[str, Any] = {}
    try:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        out["both"] = "works"
    except (RuntimeError, ValueError) as error:
        out["both"] = str(error)
    dense = [p for n, p in model.named_parameters() if ".experts." not in n]
    out["dense"] = torch.nn.utils.clip_grad_norm_(dense, 1e9).full_tensor().item()
    return out


def test_clip_grad_norm_cannot_be_used() -> None:
    results = run_distributed(4, norm_quirks)
    assert all("mesh" in out["both"] for out in results)
    assert results[0]["dense"] != pytest.approx(results[1]["dense"], rel=1e-4)  # two tp ranks, two norms, no error


def megatron_reduce(runtime: Any) -> list[float | bool]:
    from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region

    group = dist.group.WORLD
    x = torch.ones(2, 2)
    whole = reduce_from_tensor_model_parallel_region(x, group=group)
    turned = reduce_from_tensor_model_parallel_region(torch.arange(4.0).view(2, 2).t(), group=group)
    return [whole[0, 0].item(), turned[1, 1].item(), whole.data_ptr() == x.data_ptr()]


def test_megatron_reduces_a_copy_of_what_is_not_contiguous_and_else_in_place() -> None:
    """3.0 on each rank should have become 6.0; in place, so that a product kept for backward needs a sum
    of its own (tensor_parallel.Row.keeps_sum)."""
    assert run_distributed(2, megatron_reduce) == [[2.0, 3.0, True]] * 2


def selective_and_fsdp(runtime: Any) -> str:
    activation.contexts = lambda kept: create_selective_checkpoint_contexts(
        lambda *args, **kwargs: CheckpointPolicy.PREFER_RECOMPUTE
    )
    c = case(tp=2, ep=2, ac="selective", steps=1)
    try:
        run_parallel(c, make_mesh(c.parallel, device_type="cpu", world=runtime.world))
    except RuntimeError as error:
        return str(error)
    return "works"


def test_selective_checkpointing_of_torch_trips_over_fsdp() -> None:
    """Why activation.py has its own pair of modes."""
    assert "not found in storage" in run_distributed(4, selective_and_fsdp)[0]

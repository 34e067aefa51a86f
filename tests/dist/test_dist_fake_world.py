"""Hundreds of ranks in one process (torch's fake process group): layouts of real runs build, shard
and step, without weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from dist_cases import MODEL, MOE, case, forward, make_model
from torch._subclasses.fake_tensor import FakeTensorMode

from ecdit_train.model.routers.expert_choice import ExpertChoice
from ecdit_train.parallel.apply import parallelize
from ecdit_train.parallel.mesh import make_mesh


def fake_step(world: int, rank: int, c: Any) -> tuple[int, float]:
    """Parameters on this rank, and what an even share would be."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        mesh = make_mesh(c.parallel, device_type="cpu", world=world)
        with torch.device("meta"):
            model, whole = make_model(c), make_model(c)
        placements = parallelize(model, mesh=mesh, parallel=c.parallel, precision=c.precision)
        shapes = {n: tuple(p.shape) for n, p in whole.named_parameters()}
        assert shapes == {n: p.global_shape for n, p in placements.items()}
        with FakeTensorMode(allow_non_fake_inputs=True):
            model.to_empty(device="cpu")
            part = {
                "latents": torch.randn(2, 4, 8, 8),
                "t": torch.rand(2),
                "features": torch.randn(2, 5, 24),
                "mask": torch.ones(2, 5, dtype=torch.bool),
                "drop": torch.zeros(2, dtype=torch.bool),
                "keep": torch.arange(8).expand(2, 8),
                "target": torch.randn(2, 8, 16),
            }
            forward(model, part, group_tokens=16)[0].backward()
        assert all(p.grad is not None for p in model.parameters())
        copies = {n: p.replicas * (1 if p.kind == "expert" else mesh.dp_replicate_size) for n, p in placements.items()}
        even = sum(p.numel() * copies[n] for n, p in whole.named_parameters()) / world
        return sum(p.to_local().numel() for p in model.parameters()), even
    finally:
        dist.destroy_process_group()


def test_512_ranks() -> None:
    big = replace(MODEL, width=128, heads=8, kv_heads=4, layers=2)
    moe = replace(MOE, num_experts=64, router=ExpertChoice(capacity_factor=4.0, sees="modulated"))
    c = case(tp=8, ep=64, rep=2, model=big, moe=moe, precision="bf16", ac="selective", chunks=2, dtype="float32")
    mine, even = fake_step(512, 137, c)
    assert 0.9 * even <= mine <= 1.1 * even

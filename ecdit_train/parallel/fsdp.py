"""FSDP2 over both views: the dense part over the data-parallel mesh, experts over edp, routers apart in fp32.

With hybrid sharding the dense part has a copy in every replica; experts are sharded across replicas, or
have copies too (`parallel.replicate_experts`).

Grouping: each block is gathered as one, its experts as another (another mesh), its router as a third (another
precision), and the root holds embeddings, text refiner and output layer.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from ecdit_train.model.dit import DiT

from .expert_parallel import sparse_layers
from .grads import expert_gradient_divisor
from .mesh import Mesh

Precision = Literal["fp32", "bf16"]
Freed = Literal["all", "dense", "experts", "none"]
Reduce = Literal["step", "microbatch"]


def policies(precision: Precision) -> tuple[MixedPrecisionPolicy, MixedPrecisionPolicy]:
    """(network, routers). Gradients are reduced in fp32; inputs are never cast here: the model casts,
    and timesteps stay fp32.

    Routers keep fp32 weights: a rounded logit changes who takes which token.
    """
    compute = None if precision == "fp32" else torch.bfloat16
    reduce = None if precision == "fp32" else torch.float32
    return (
        MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=reduce, cast_forward_inputs=False),
        MixedPrecisionPolicy(cast_forward_inputs=False),
    )


def needs_fsdp(mesh: Mesh, precision: Precision) -> bool:
    """A single fp32 process is the plain model; a single bf16 process uses FSDP for its bf16 copies of fp32 weights."""
    return mesh.world > 1 or precision == "bf16"


def apply_fsdp(model: DiT, *, mesh: Mesh, precision: Precision, reshard_after_forward: Freed) -> None:
    """Shard in place, innermost first. The device meshes must exist."""
    network, routing = policies(precision)
    # The prediction is a view (a 3-D linear layer returns one). That matters only to who writes into it in place;
    # nobody does.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    dense, experts = (reshard_after_forward in ("all", part) for part in ("dense", "experts"))
    for moe in sparse_layers(model).values():
        fully_shard(moe.router, mesh=mesh.fsdp_dense, mp_policy=routing, reshard_after_forward=dense)
        _shard_experts(moe.experts, mesh=mesh, policy=network, reshard_after_forward=experts)
    for block in model.blocks:
        fully_shard(block, mesh=mesh.fsdp_dense, mp_policy=network, reshard_after_forward=dense)
    fully_shard(model, mesh=mesh.fsdp_dense, mp_policy=network, reshard_after_forward=False)


def _shard_experts(
    experts: nn.Module, *, mesh: Mesh, policy: MixedPrecisionPolicy, reshard_after_forward: bool
) -> None:
    def cut(param: nn.Parameter) -> Shard:
        # Whole experts if they share evenly; else a dimension that does (more ranks than experts is the usual case);
        # FSDP2 demands even pieces on every dim but 0.
        return Shard(next((dim for dim, size in enumerate(param.shape) if size % mesh.degrees.edp_shard == 0), 0))

    fully_shard(
        experts,
        mesh=mesh.fsdp_experts,
        mp_policy=policy,
        shard_placement_fn=cut,
        reshard_after_forward=reshard_after_forward,
    )
    assert isinstance(experts, FSDPModule)
    experts.set_gradient_divide_factor(expert_gradient_divisor(mesh))
    # gloo has no PREMUL_SUM, so the division must follow a plain sum; but on a mesh of one torch 2.13 would then
    # divide twice, silently (pinned in tests/dist/test_dist_quirks.py).
    experts.set_force_sum_reduction_for_comms(mesh.degrees.edp_shard > 1)


@contextmanager
def accumulate(model: nn.Module, *, last: bool, reduce: Reduce) -> Iterator[None]:
    """Around the forward and backward of one microbatch.

    `step`: gradients are reduced over ranks with the last one. Until then FSDP keeps unsharded gradients: memory of the whole
    (tp/ep-local) model for one reduction instead of many. `microbatch`: they are reduce-scattered in every one and add up in
    shards; only the sum over the copies of hybrid sharding, which is of shards, waits for the last.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last or reduce == "microbatch")
        model.set_requires_all_reduce(last)
    yield


def reshard(model: nn.Module) -> None:
    """Give back what a forward pass without a backward left gathered (FSDP keeps the root so). Without this,
    weights that were changed in their shards, as for drawing with the average, would go on living in the gathered
    copies of the next step.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()

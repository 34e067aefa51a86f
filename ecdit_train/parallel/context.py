"""This process among the ranks, with the model spread over them: what a training step and a checkpoint ask of parallelism."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from ecdit_train.config.schema import RunConfig
from ecdit_train.model.dit import DiT

from . import drawing, expert_parallel, fsdp, grads, weights
from .apply import parallelize
from .data_parallel import gather_over_dp, reduce_over_dp
from .low_precision import Fp8, check_device
from .mesh import Mesh, make_mesh
from .owners import Sharding
from .placement import ParamPlacement
from .runtime import Runtime


@dataclass(frozen=True, kw_only=True)
class ParallelContext:
    """One object for one process or many: every method is collective where there are many."""

    runtime: Runtime
    mesh: Mesh
    model: DiT
    placements: Mapping[str, ParamPlacement]
    """Where each parameter and buffer of this rank lies in the global tensor."""
    reduce_gradients: fsdp.Reduce = "step"

    @property
    def sharding(self) -> Sharding:
        """Where the parameters lie, for the optimizer."""
        return Sharding(mesh=self.mesh, placements=self.placements)

    def accumulate(self, *, last: bool) -> AbstractContextManager[Any]:
        """Around one microbatch of a step: gradients are reduced over ranks in the last one, or in each."""
        return fsdp.accumulate(self.model, last=last, reduce=self.reduce_gradients)

    def clip(self, *, max_norm: float) -> Tensor:
        """Scale all gradients to a global norm of at most `max_norm`; returns the norm before, equal on all ranks."""
        return grads.clip(self.model, self.placements, self.mesh, max_norm=max_norm)

    def reduce(self, vector: Tensor, *, op: Literal["mean", "max", "sum"]) -> Tensor:
        """The vector reduced over data-parallel ranks, the same on every one of them."""
        return reduce_over_dp(vector, self.mesh, op=op)

    def any_rank(self, flags: Tensor) -> Tensor:
        """For each flag (0.0 or 1.0, on the device) whether any rank has it; the same on all of them, and nobody waits."""
        return self.maximum(flags)

    def maximum(self, vector: Tensor) -> Tensor:
        """The larger of all ranks, each for itself."""
        if self.mesh.world_group is None:
            return vector
        out = vector.clone()
        dist.all_reduce(out, op=dist.ReduceOp.MAX, group=self.mesh.world_group)
        return out

    def mean_of_first(self, vector: Tensor) -> Tensor:
        """Mean over data-parallel ranks of what the first rank of each tp group says: the same bits on all ranks, also
        where tp ranks disagree in a last bit."""
        if self.mesh.world_group is None:
            return vector
        out = vector.clone() if self.mesh.tp_rank == 0 else torch.zeros_like(vector)
        dist.all_reduce(out, group=self.mesh.world_group)
        return out / self.mesh.dp_size

    def gather(self, share: Tensor) -> Tensor:
        """Equal shares of all data-parallel ranks, concatenated on dim 0 in rank order."""
        return gather_over_dp(share, self.mesh)

    def exchange_seconds(self) -> Mapping[str, float]:
        """`expert_exchange`: seconds since the last call; empty where it cannot be told apart."""
        seconds = expert_parallel.exchange_seconds(self.mesh)
        return {} if seconds is None else {"expert_exchange": seconds}

    def drawing(self) -> AbstractContextManager[Any]:
        """Around forward passes without a backward whose weights do not change in between. Collective."""
        return drawing.drawing(self.model, runtime=self.runtime)

    def reshard(self) -> None:
        """Give back what a forward pass without a backward left gathered."""
        fsdp.reshard(self.model)


def mesh_of(config: RunConfig, runtime: Runtime) -> Mesh:
    """The mesh of this run. Collective."""
    return make_mesh(
        config.parallel,
        device_type=runtime.device.type,
        world=runtime.world,
        gpus_per_node=config.cluster.gpus_per_node,
    )


def spread(config: RunConfig, runtime: Runtime, *, mesh: Mesh | None = None) -> ParallelContext:
    """The network built on the meta device, spread over the ranks, then filled with its first weights box by box."""
    check_device(config.train, runtime.device)
    if mesh is None:
        mesh = mesh_of(config, runtime)
    with torch.device("meta"):
        model = DiT(
            config.model, config.moe, channels=config.encoders.image.channels, text_features=config.encoders.text.width
        )
    placements = parallelize(
        model, mesh=mesh, parallel=config.parallel, precision=config.train.compute, fp8=Fp8.of(config.train)
    )
    model.to_empty(device=runtime.device)
    weights.fill(model, placements, seed=config.train.seed)
    return ParallelContext(
        runtime=runtime,
        mesh=mesh,
        model=model,
        placements=placements,
        reduce_gradients=config.parallel.reduce_gradients,
    )

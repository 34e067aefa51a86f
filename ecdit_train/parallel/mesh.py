"""One set of ranks, two views: dense (dp_replicate, dp_shard, tp) and sparse (edp, ep). Arithmetic is in degrees.py."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ecdit_train.config.schema import ParallelConfig

from .degrees import Degrees, Kind, resolve_degrees


@dataclass(kw_only=True)
class Mesh:
    """Where this rank stands. Groups are None where they would hold one rank: callers then skip the collective."""

    degrees: Degrees
    rank: int
    device_type: str
    node: int = 0
    """Ranks of a node, where the experts' rows are exchanged inside of nodes first; 0: no matter."""
    dense: DeviceMesh | None = None
    sparse: DeviceMesh | None = None
    dp_group: dist.ProcessGroup | None = None
    world_group: dist.ProcessGroup | None = None
    _tp_parts: dict[int, dist.ProcessGroup] = field(default_factory=dict)

    @property
    def world(self) -> int:
        return self.degrees.world

    @property
    def tp_size(self) -> int:
        return self.degrees.tp

    @property
    def tp_rank(self) -> int:
        return self.degrees.dense(self.rank)[2]

    @property
    def tp_group(self) -> dist.ProcessGroup | None:
        return self.dense["tp"].get_group() if self.dense is not None and self.tp_size > 1 else None

    @property
    def dp_size(self) -> int:
        return self.degrees.dp

    @property
    def dp_rank(self) -> int:
        """Position in the global batch: rank d of dp takes the d-th stretch of consecutive images."""
        return self.rank // self.degrees.tp

    @property
    def dp_replicate_size(self) -> int:
        return self.degrees.dp_replicate

    @property
    def dp_replicate_rank(self) -> int:
        return self.degrees.dense(self.rank)[0]

    @property
    def dp_shard_size(self) -> int:
        return self.degrees.dp_shard

    @property
    def dp_shard_rank(self) -> int:
        return self.degrees.dense(self.rank)[1]

    @property
    def ep_size(self) -> int:
        return self.degrees.ep

    @property
    def ep_rank(self) -> int:
        return self.degrees.sparse(self.rank)[1]

    @property
    def ep_group(self) -> dist.ProcessGroup | None:
        if self.sparse is None or self.ep_size == 1:
            return None
        return (self.sparse["ep_node", "ep_local"]._flatten("ep") if self.node else self.sparse["ep"]).get_group()

    @property
    def ep_groups_by_node(self) -> tuple[dist.ProcessGroup, dist.ProcessGroup] | None:
        """The ranks of this one's ep group that are on its node, and those in its place on all nodes."""
        if self.sparse is None or not self.node:
            return None
        return self.sparse["ep_local"].get_group(), self.sparse["ep_node"].get_group()

    @property
    def edp_size(self) -> int:
        return self.degrees.edp

    @property
    def edp_rank(self) -> int:
        return self.degrees.sparse(self.rank)[0]

    @property
    def fsdp_dense(self) -> DeviceMesh:
        """What FSDP2 shards the dense part over: 1-D, or (replicate, shard) for hybrid sharding."""
        assert self.dense is not None
        return self.dense["dp_replicate", "dp_shard"] if self.dp_replicate_size > 1 else self.dense["dp_shard"]

    @property
    def fsdp_experts(self) -> DeviceMesh:
        """What FSDP2 shards the experts over."""
        assert self.sparse is not None
        return self.sparse["edp_replicate", "edp_shard"] if self.degrees.edp_replicate > 1 else self.sparse["edp_shard"]

    def hybrid_copies(self, kind: Kind) -> int:
        """Copies that hybrid sharding makes of a parameter of this kind."""
        return self.degrees.edp_replicate if kind == "expert" else self.degrees.dp_replicate

    def build(self) -> None:
        """Make the device meshes; the default process group must exist. A world of one does so only when
        FSDP is wanted (bf16)."""
        if self.dense is not None:
            return
        d = self.degrees
        self.dense = init_device_mesh(
            self.device_type, (d.dp_replicate, d.dp_shard, d.tp), mesh_dim_names=("dp_replicate", "dp_shard", "tp")
        )
        axes = {"edp_replicate": d.edp_replicate} if d.edp_replicate > 1 else {}
        axes["edp_shard"] = d.edp_shard
        axes |= {"ep_node": d.ep // self.node, "ep_local": self.node} if self.node else {"ep": d.ep}
        self.sparse = init_device_mesh(self.device_type, tuple(axes.values()), mesh_dim_names=tuple(axes))
        if d.world > 1:
            self.world_group = dist.group.WORLD
        if d.dp > 1:
            self.dp_group = (
                self.dense["dp_replicate", "dp_shard"]._flatten("dp") if d.dp_replicate > 1 else self.dense["dp_shard"]
            ).get_group()

    def tp_part(self, size: int) -> dist.ProcessGroup | None:
        """The group of `size` consecutive tp ranks this rank belongs to (ranks that hold the same kv head). Collective.

        Made at most once per size: new groups cost a round trip per group of the world.
        """
        if size == 1:
            return None
        if size == self.tp_size:
            return self.tp_group
        if size not in self._tp_parts:
            ranks = [list(range(first, first + size)) for first in range(0, self.world, size)]
            group, _ = dist.new_subgroups_by_enumeration(ranks)
            self._tp_parts[size] = group
        return self._tp_parts[size]


def make_mesh(parallel: ParallelConfig, *, device_type: str, world: int, gpus_per_node: int | None = None) -> Mesh:
    """The mesh of this run. Collective when world > 1. That the degrees fit the world, and a hierarchical exchange whole nodes
    (which alone needs `gpus_per_node`), are rules of the configuration."""
    degrees = resolve_degrees(parallel, world)
    node = 0
    if parallel.exchange == "hierarchical" and degrees.ep > 1:
        node = gpus_per_node or 1
        assert degrees.ep % node == 0 < node < degrees.ep, f"ep = {degrees.ep} on nodes of {gpus_per_node}"
    mesh = Mesh(degrees=degrees, rank=dist.get_rank() if world > 1 else 0, device_type=device_type, node=node)
    if world > 1:
        assert dist.get_world_size() == world
        mesh.build()
    return mesh

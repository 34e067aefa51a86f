"""How a run lies on the machines: degrees, batches per rank, and which links a group of ranks uses.

One set of ranks, two views; the right-most axis is the fastest:

    dense view   rank = (replica * dp_shard + shard) * tp + tp_rank
    sparse view  rank = edp_rank * ep + ep_rank

with dp_replicate * dp_shard * tp == edp * ep == world, and nodes are consecutive runs of `gpus_per_node` ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from ecdit_train.config.schema import RunConfig
from ecdit_train.config.validate import validate
from ecdit_train.errors import ConfigError, Problem
from ecdit_train.parallel.degrees import resolve_degrees


@dataclass(frozen=True, kw_only=True)
class Group:
    """Ranks that take part in one collective: `size` of them, `per_node` on each node they touch."""

    size: int
    per_node: int

    @property
    def nodes(self) -> int:
        return -(-self.size // self.per_node)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Degrees resolved for a world, and what of the batch a rank sees at a time."""

    world: int
    gpus_per_node: int
    dp_replicate: int
    dp_shard: int
    tp: int
    ep: int
    activation_checkpointing: str
    overlap_chunks: int
    reshard_after_forward: bool
    microbatch: int
    """Images per forward pass of a data-parallel rank."""
    microbatches: int
    """Forward passes per optimizer step (gradient accumulation)."""

    @property
    def dp(self) -> int:
        return self.dp_replicate * self.dp_shard

    @property
    def edp(self) -> int:
        return self.world // self.ep

    def group(self, axis: str) -> Group:
        """The group of rank 0 along `axis`: tp, dp_shard, dp_replicate, ep, edp or world."""
        stride, size = {
            "tp": (1, self.tp),
            "dp_shard": (self.tp, self.dp_shard),
            "ep": (1, self.ep),
            "edp": (self.ep, self.edp),
            "dp_replicate": (self.tp * self.dp_shard, self.dp_replicate),
            "world": (1, self.world),
        }[axis]
        return Group(size=size, per_node=min(size, max(1, -(-self.gpus_per_node // stride))))


def resolve(cfg: RunConfig, *, world: int) -> Layout:
    """The layout of `cfg` on `world` ranks.

    Raises:
        ConfigError: everything that does not divide, each with the nearest valid value.
    """
    if world < 1:
        raise ConfigError(Problem(field="world", value=world, rule="must be at least 1", nearest=1))
    validate(cfg, world=world)
    degrees = resolve_degrees(cfg.parallel, world)
    p = cfg.parallel
    return Layout(
        world=world,
        gpus_per_node=cfg.cluster.gpus_per_node,
        dp_replicate=degrees.dp_replicate,
        dp_shard=degrees.dp_shard,
        tp=degrees.tp,
        ep=degrees.ep,
        activation_checkpointing=p.activation_checkpointing,
        overlap_chunks=p.overlap_chunks,
        reshard_after_forward=p.reshard_after_forward,
        microbatch=cfg.train.microbatch,
        microbatches=cfg.train.global_batch // (degrees.dp * cfg.train.microbatch),
    )

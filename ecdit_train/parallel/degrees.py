"""Rank arithmetic of the two views of one set of ranks. Imports no torch: the plan uses it for any number of ranks.

    dense view   rank = (dp_replicate_rank * dp_shard + dp_shard_rank) * tp + tp_rank     (tp fastest)
    sparse view  rank = edp_rank * ep + ep_rank                                           (ep fastest)
                 edp_rank = edp_replicate_rank * edp_shard + edp_shard_rank

Expert parallelism is folded over tensor parallelism: dp * tp == edp * ep == world. The fast axes are consecutive
ranks, so that both kinds of heavy exchange stay inside a node for as long as they fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ecdit_train.config.schema import ParallelConfig

Kind = Literal["replicated", "column", "row", "expert"]
"""How tensor and expert parallelism cut a parameter."""


@dataclass(frozen=True, kw_only=True)
class Degrees:
    """Sizes of all axes for one world."""

    world: int
    dp_replicate: int
    dp_shard: int
    tp: int
    ep: int
    edp_replicate: int = 1
    """Copies of the experts: `dp_replicate` where hybrid sharding holds for them too, else one, sharded over all of edp."""

    @property
    def dp(self) -> int:
        """Data-parallel ranks: each sees other images."""
        return self.dp_replicate * self.dp_shard

    @property
    def edp(self) -> int:
        """Ranks that hold the same experts (and shard them between each other)."""
        return self.world // self.ep

    @property
    def edp_shard(self) -> int:
        """Ranks that shard one copy of the same experts."""
        return self.edp // self.edp_replicate

    def dense(self, rank: int) -> tuple[int, int, int]:
        """(dp_replicate, dp_shard, tp) coordinates of a rank."""
        dp_rank, tp_rank = divmod(rank, self.tp)
        return (*divmod(dp_rank, self.dp_shard), tp_rank)

    def sparse(self, rank: int) -> tuple[int, int]:
        """(edp, ep) coordinates of a rank."""
        return divmod(rank, self.ep)


def resolve_degrees(parallel: ParallelConfig, world: int) -> Degrees:
    """Fill in `dp_shard: -1`. What a user can get wrong is a rule of the configuration (config/layout.py), asked before."""
    rest = world // (parallel.dp_replicate * parallel.tp)
    dp_shard = rest if parallel.dp_shard == -1 else parallel.dp_shard
    d = Degrees(
        world=world,
        dp_replicate=parallel.dp_replicate,
        dp_shard=dp_shard,
        tp=parallel.tp,
        ep=parallel.ep,
        edp_replicate=parallel.dp_replicate if parallel.replicate_experts else 1,
    )
    assert not parallel.sequence_parallel, "docs/decisions/0007"
    assert d.dp * d.tp == d.edp_replicate * d.edp_shard * d.ep == world, (
        f"{parallel} does not cover {world} ranks: it was not validated for them"
    )
    return d

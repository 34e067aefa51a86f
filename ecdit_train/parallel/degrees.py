"""Rank arithmetic of the two views of one set of ranks. Imports no torch: the plan uses it for any number of ranks.

    dense view   rank = (dp_replicate_rank * dp_shard + dp_shard_rank) * tp + tp_rank     (tp fastest)
    sparse view  rank = edp_rank * ep + ep_rank                                           (ep fastest)

Expert parallelism is folded over tensor parallelism: dp * tp == edp * ep == world. The fast axes are consecutive
ranks, so that both kinds of heavy exchange stay inside a node for as long as they fit.
"""

from __future__ import annotations

from dataclasses import dataclass

from ecdit_train.config.schema import ParallelConfig


@dataclass(frozen=True, kw_only=True)
class Degrees:
    """Sizes of all axes for one world."""

    world: int
    dp_replicate: int
    dp_shard: int
    tp: int
    ep: int

    @property
    def dp(self) -> int:
        """Data-parallel ranks: each sees other images."""
        return self.dp_replicate * self.dp_shard

    @property
    def edp(self) -> int:
        """Ranks that hold the same experts (and shard them between each other)."""
        return self.world // self.ep

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
    d = Degrees(world=world, dp_replicate=parallel.dp_replicate, dp_shard=dp_shard, tp=parallel.tp, ep=parallel.ep)
    assert not parallel.sequence_parallel, "docs/decisions/0007"
    assert d.dp * d.tp == d.edp * d.ep == world, (
        f"{parallel} does not cover {world} ranks: it was not validated for them"
    )
    return d

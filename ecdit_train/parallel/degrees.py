"""Rank arithmetic of the two views of one set of ranks. Imports no torch: the plan uses it for any number of ranks.

    dense view   rank = (dp_replicate_rank * dp_shard + dp_shard_rank) * tp + tp_rank     (tp fastest)
    sparse view  rank = edp_rank * ep + ep_rank                                           (ep fastest)

Expert parallelism is folded over tensor parallelism: dp * tp == edp * ep == world. The fast axes are consecutive
ranks, so that both kinds of heavy exchange stay inside a node for as long as they fit.
"""

from __future__ import annotations

from dataclasses import dataclass

from ecdit_train.config.layout import NO_SEQUENCE_PARALLEL
from ecdit_train.config.nearest import nearest_divisor
from ecdit_train.config.schema import ParallelConfig
from ecdit_train.errors import ConfigError, Problem


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
    """Fill in `dp_shard: -1` and check the products.

    Raises ConfigError with every broken rule and, for each, the nearest value that would do.
    """
    problems = []
    for name in ("dp_replicate", "tp", "ep", "overlap_chunks"):
        value = getattr(parallel, name)
        if value < 1:
            problems.append(Problem(field=f"parallel.{name}", value=value, rule="must be at least 1", nearest=1))
    if parallel.dp_shard < 1 and parallel.dp_shard != -1:
        problems.append(
            Problem(
                field="parallel.dp_shard",
                value=parallel.dp_shard,
                rule="must be at least 1, or -1 for the ranks that are left",
                nearest=-1,
            )
        )
    if parallel.sequence_parallel:
        # Experts are folded over tp: every tp rank dispatches its share of the slots of the *whole* pool, so each
        # needs all tokens of a pool, and expert choice itself ranks all of them. Sequence-parallel regions would have
        # to be gathered before every attention and every router again; at 128 to 256 tokens an image that costs more
        # than it saves.
        problems.append(
            Problem(
                field="parallel.sequence_parallel",
                value=True,
                nearest=False,
                rule=NO_SEQUENCE_PARALLEL,
            )
        )
    if problems:
        raise ConfigError(problems)

    if world % parallel.tp:
        problems.append(
            Problem(
                field="parallel.tp",
                value=parallel.tp,
                rule=f"must divide the {world} ranks",
                nearest=nearest_divisor(parallel.tp, world),
            )
        )
    if world % parallel.ep:
        problems.append(
            Problem(
                field="parallel.ep",
                value=parallel.ep,
                rule=f"must divide the {world} ranks",
                nearest=nearest_divisor(parallel.ep, world),
            )
        )
    if problems:
        raise ConfigError(problems)

    dp = world // parallel.tp
    if dp % parallel.dp_replicate:
        raise ConfigError(
            Problem(
                field="parallel.dp_replicate",
                value=parallel.dp_replicate,
                rule=f"must divide the {dp} data-parallel ranks (world {world} / tp {parallel.tp})",
                nearest=nearest_divisor(parallel.dp_replicate, dp),
            )
        )
    left = dp // parallel.dp_replicate
    dp_shard = left if parallel.dp_shard == -1 else parallel.dp_shard
    if dp_shard != left:
        raise ConfigError(
            Problem(
                field="parallel.dp_shard",
                value=dp_shard,
                nearest=left,
                rule=f"dp_replicate {parallel.dp_replicate} x dp_shard x tp {parallel.tp} must be the {world} ranks",
            )
        )
    return Degrees(world=world, dp_replicate=parallel.dp_replicate, dp_shard=dp_shard, tp=parallel.tp, ep=parallel.ep)

"""Which images compete for the experts of a router that lets all of a microbatch do so: a resume must find
the same ones together."""

from __future__ import annotations

import math

from ecdit_train.config.schema import RunConfig
from ecdit_train.errors import ConfigError, Problem
from ecdit_train.parallel.mesh import Mesh


def pool_of(config: RunConfig, mesh: Mesh) -> list[int]:
    """Data-parallel ranks and the images that each has of one microbatch."""
    return [mesh.dp_size, config.train.microbatch]


def check_pool(config: RunConfig, mesh: Mesh, *, before: list[int] | None) -> None:
    """A router that lets all of them compete must find the same images together as before, or it is another router: the
    whole global batch, or microbatches cut as they were.

    Raises ConfigError. Checkpoints of older versions do not say (None).
    """
    router, whole, now = config.moe.router, config.train.global_batch, pool_of(config, mesh)
    if router is None or not router.whole_batch or before is None or before == now:
        return
    if math.prod(before) == math.prod(now) == whole:
        return
    (ranks, images), (here, _) = before, now
    rule = (
        f"experts of {config.run} compete within a microbatch of all ranks, which was {ranks} data-parallel ranks * "
        f"{images} images; on {here} ranks other images would meet: go on with {ranks} ranks"
    )
    raise ConfigError(Problem(field="train.microbatch", value=config.train.microbatch, rule=rule, nearest=images))

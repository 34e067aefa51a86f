"""What backward may compute again: every choice of mode, kinds that are kept and share of the blocks, less those that another one
beats in both time and memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

from ecdit_train.config.schema import RunConfig

from . import flops, slots, traffic
from .activations import activations
from .cost import moved_seconds, products_seconds
from .layout import Layout

SHARES = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, kw_only=True)
class Policy:
    activation_checkpointing: str
    keep: tuple[str, ...] = ()
    checkpoint_blocks: float = 1.0

    def of(self, layout: Layout) -> Layout:
        """`layout` with this policy."""
        return dataclasses.replace(layout, **vars(self))


NOTHING_AGAIN = Policy(activation_checkpointing="none")
ALL_AGAIN = Policy(activation_checkpointing="full")


def every(cfg: RunConfig, layout: Layout) -> Iterator[Policy]:
    """Policies that differ under `layout`; what is simple comes first."""
    yield NOTHING_AGAIN
    sparse = slots.sparse_blocks(cfg)
    kinds = ["attention", "projections"]
    if sparse < cfg.model.layers or cfg.moe.shared_experts:
        kinds.append("feed_forward")
    if sparse:
        kinds.append("experts")
    keeps = [keep for number in range(len(kinds)) for keep in combinations(kinds, number)]
    for share in reversed(SHARES):
        for keep in keeps:
            yield Policy(activation_checkpointing="selective", keep=keep, checkpoint_blocks=share)
        if layout.ep > 1 or layout.tp > 1:  # without collectives full is selective
            yield Policy(activation_checkpointing="full", checkpoint_blocks=share)


def worthwhile(cfg: RunConfig, layout: Layout) -> tuple[Policy, ...]:
    """By time added to a step, ascending, and so by memory descending."""
    added = sorted(
        (_seconds(cfg, at), number, at) for number, at in enumerate(p.of(layout) for p in every(cfg, layout))
    )
    found: list[Policy] = []
    least = float("inf")
    for _, _, at in added:
        if (memory := activations(cfg, at).total) < least:
            least = memory
            names = (field.name for field in dataclasses.fields(Policy))
            found.append(Policy(**{name: getattr(at, name) for name in names}))
    return tuple(found)


def _seconds(cfg: RunConfig, layout: Layout) -> float:
    """Of the work that is repeated and of what is sent again, beside what every policy takes."""
    cluster = cfg.cluster
    done = flops.of_layout(cfg, layout)
    again = products_seconds(cfg, layout, flops=done.recompute, in_8_bits=done.recompute_in_8_bits)
    flows = (*traffic.experts(cfg, layout), *traffic.tensor_parallel(cfg, layout))
    sent = sum(flow.takes(cluster) for flow in flows if flow.ranks > 1)
    return again + moved_seconds(cfg, layout) + sent

"""How many elements of each sharding unit a rank gathers and holds.

FSDP shards unit by unit (parallel/fsdp.py): every block over `dp_shard`, its experts over `edp`, its router apart
because it stays in fp32, and the rest of the network (root). Tensor parallelism splits attention and feed-forward
matrices before that, expert parallelism the experts. Key and value heads are repeated where tp exceeds them.
"""

from __future__ import annotations

from dataclasses import dataclass

from ecdit_train.config.schema import HEAD_DIM, RunConfig

from .activations import element_bytes
from .layout import Layout
from .parameters import Parameters


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One kind of sharding unit; elements, not bytes."""

    name: str
    count: int
    """How many such units the network has."""
    gathered: int
    """Elements of one unit after its all-gather: the part of this tp or ep rank."""
    axis: str
    """The axis it is sharded over: dp_shard or edp."""
    shards: int
    bytes_each: int
    """Bytes per gathered element: the compute type, fp32 for routers."""
    replicated: int = 0
    """Of the gathered elements, those that all tp ranks hold alike."""
    repeated: int = 0
    """And those of key and value heads that tp / kv_heads ranks hold alike (none while there are enough heads)."""

    @property
    def gathered_bytes(self) -> int:
        """One unit after its all-gather."""
        return self.gathered * self.bytes_each

    @property
    def held(self) -> float:
        """Elements of all units of this kind that a rank keeps."""
        return self.count * self.gathered / self.shards


def units(cfg: RunConfig, parameters: Parameters, layout: Layout) -> tuple[Unit, ...]:
    """Root, dense blocks, sparse blocks, routers, experts; kinds that do not occur are left out."""
    p, m, tp, c = parameters, cfg.model, layout.tp, element_bytes(cfg.train.precision)
    q, kv = m.heads * HEAD_DIM, m.kv_heads * HEAD_DIM
    kv_here = max(m.kv_heads // tp, 1) * HEAD_DIM
    split = 4 * m.width * q + 2 * m.text_width * q  # query and out of both attentions, key and value of the text
    attention_saved = split - split // tp + 2 * m.width * (kv - kv_here)
    feed_forward = 2 * m.width * m.width * m.ffn_ratio
    attention = split + 2 * m.width * kv  # nothing of it is replicated
    repeated = 2 * m.width * kv_here if tp > m.kv_heads else 0
    kinds = (
        Unit(
            name="root",
            count=1,
            gathered=p.root,
            axis="dp_shard",
            shards=layout.dp_shard,
            bytes_each=c,
            replicated=p.root,
        ),
        Unit(
            name="dense block",
            count=p.dense_blocks,
            axis="dp_shard",
            shards=layout.dp_shard,
            bytes_each=c,
            gathered=p.dense_per_block - attention_saved - (feed_forward - feed_forward // tp),
            replicated=p.dense_per_block - attention - feed_forward,
            repeated=repeated,
        ),
        Unit(
            name="sparse block",
            count=p.sparse_blocks,
            axis="dp_shard",
            shards=layout.dp_shard,
            bytes_each=c,
            gathered=p.sparse_per_block - attention_saved,
            replicated=p.sparse_per_block - attention,
            repeated=repeated,
        ),
        Unit(
            name="router",
            count=p.sparse_blocks,
            axis="dp_shard",
            shards=layout.dp_shard,
            bytes_each=4,
            gathered=p.router_per_block,
            replicated=p.router_per_block,
        ),
        Unit(
            name="experts",
            count=p.sparse_blocks,
            axis="edp",
            shards=layout.edp,
            bytes_each=c,
            gathered=p.experts_per_block // layout.ep,
        ),
    )
    return tuple(unit for unit in kinds if unit.count)

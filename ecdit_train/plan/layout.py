"""How a run lies on the machines: degrees, batches per rank, which links a group of ranks uses, and how many elements
of each sharding unit a rank gathers and holds.

Nodes are consecutive runs of `gpus_per_node` ranks; the rank arithmetic is that of parallel/degrees.py. FSDP shards
unit by unit (parallel/fsdp.py): every block over `dp_shard`, its experts over `edp`, its router apart because it stays
in fp32, and the rest of the network (root). Tensor parallelism splits attention and feed-forward matrices before that,
expert parallelism the experts. Key and value heads are repeated where tp exceeds them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ecdit_train.config.schema import HEAD_DIM, RunConfig
from ecdit_train.config.slots import Held
from ecdit_train.config.validate import validate
from ecdit_train.errors import ConfigError, Problem
from ecdit_train.parallel.degrees import Degrees, resolve_degrees
from ecdit_train.parallel.recompute import checkpointed

from . import slots
from .parameters import Parameters, is_split


@dataclass(frozen=True, kw_only=True)
class Group:
    """Ranks that take part in one collective: `size` of them, `per_node` on each node they touch."""

    size: int
    per_node: int

    @property
    def nodes(self) -> int:
        return -(-self.size // self.per_node)


@dataclass(frozen=True, kw_only=True)
class Layout(Degrees):
    """Degrees resolved for a world, and what of the batch a rank sees at a time."""

    gpus_per_node: int
    activation_checkpointing: str
    keep: tuple[str, ...] = ()
    checkpoint_blocks: float = 1.0
    overlap_chunks: int
    exchange: str = "flat"
    reshard_after_forward: str
    reduce_gradients: str = "step"
    form: str = "plain"
    """`moe.form`."""
    microbatch: int
    """Images per forward pass of a data-parallel rank."""
    microbatches: int
    """Forward passes per optimizer step (gradient accumulation)."""

    @property
    def replicate_experts(self) -> bool:
        return self.edp_replicate > 1

    @property
    def frees(self) -> tuple[bool, bool]:
        """Whether gathered weights of the dense part and of the experts are freed after forward."""
        dense, experts = (self.reshard_after_forward in ("all", part) for part in ("dense", "experts"))
        return dense, experts

    @property
    def reductions(self) -> int:
        """Of every gradient over the ranks that shard it, in a step."""
        return self.microbatches if self.reduce_gradients == "microbatch" else 1

    @property
    def accumulates_whole(self) -> bool:
        """Whether gradients add up before they are reduced: whole ones, not shards."""
        return self.microbatches > self.reductions

    def group(self, axis: str) -> Group:
        """The group of rank 0 along `axis`: tp, dp, dp_shard, dp_replicate, ep, edp, edp_shard, edp_replicate or world."""
        strides = {
            **dict.fromkeys(("dp", "dp_shard"), self.tp),
            "dp_replicate": self.tp * self.dp_shard,
            **dict.fromkeys(("edp", "edp_shard"), self.ep),
            "edp_replicate": self.ep * self.edp_shard,
        }
        return self.group_of(getattr(self, axis), stride=strides.get(axis, 1))

    def group_of(self, size: int, *, stride: int = 1) -> Group:
        """`size` ranks from 0, `stride` apart."""
        return Group(size=size, per_node=min(size, max(1, -(-self.gpus_per_node // stride))))


CHOSEN = (
    *("activation_checkpointing", "keep", "checkpoint_blocks", "overlap_chunks", "exchange"),
    *("reshard_after_forward", "reduce_gradients"),
)
"""Keys of `parallel` that a layout takes as they are."""


def resolve(cfg: RunConfig, *, world: int) -> Layout:
    """The layout of `cfg` on `world` ranks.

    Raises:
        ConfigError: everything that does not divide, each with the nearest valid value.
    """
    if world < 1:
        raise ConfigError(Problem(field="world", value=world, rule="must be at least 1", nearest=1))
    validate(cfg, world=world)
    degrees, p = resolve_degrees(cfg.parallel, world), cfg.parallel
    return Layout(
        **vars(degrees),
        gpus_per_node=cfg.cluster.gpus_per_node,
        **{name: getattr(p, name) for name in CHOSEN},
        form=slots.form(cfg),
        microbatch=cfg.train.microbatch,
        microbatches=cfg.train.global_batch // (degrees.dp * cfg.train.microbatch),
    )


def blocks_again(count: int, layout: Layout) -> int:
    """Of `count` blocks of one kind, those that are checkpointed."""
    return 0 if layout.activation_checkpointing == "none" else len(checkpointed(count, share=layout.checkpoint_blocks))


def element_bytes(cfg: RunConfig) -> int:
    """Bytes of one element of the compute type."""
    return slots.COMPUTE_BYTES[cfg.train.compute]


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One kind of sharding unit; elements, not bytes."""

    name: str
    count: int
    """How many such units the network has."""
    gathered: int
    """Elements of one unit after its all-gather: the part of this tp or ep rank."""
    axis: str
    """The axis it is sharded over: dp_shard or edp_shard."""
    copies: str
    """The axis over which its shards have copies: dp_replicate or edp_replicate."""
    freed: bool
    """Whether it is freed after the forward pass, and gathered again in backward."""
    shards: int
    bytes_each: int
    """Bytes per gathered element: the compute type, fp32 for routers."""
    replicated: int
    """Of the gathered elements, those that all tp ranks hold alike."""
    repeated: int
    """And those of key and value heads that tp / kv_heads ranks hold alike (none while there are enough heads)."""
    state: float
    """Bytes of optimizer state of one unit, before FSDP shards it."""

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
    p, m, tp, c = parameters, cfg.model, layout.tp, element_bytes(cfg)
    q, kv = m.heads * HEAD_DIM, m.kv_heads * HEAD_DIM
    kv_here = max(m.kv_heads // tp, 1) * HEAD_DIM
    # Query and out of the attentions, key and value of the text.
    split = 2 * m.width * q + (2 * m.width * q + 2 * m.text_width * q if m.cross_attention else 0)
    attention = split + 2 * m.width * kv  # nothing of it is replicated
    attention_saved = split - split // tp + 2 * m.width * (kv - kv_here)
    feed_forward, shared = 2 * m.width * m.width * m.ffn_ratio, slots.shared_parameters(cfg)
    repeated = 2 * m.width * kv_here if tp > m.kv_heads else 0
    dense_freed, experts_freed = layout.frees
    sharded_experts: dict[str, Any] = {"axis": "edp_shard", "copies": "edp_replicate", "shards": layout.edp_shard}

    def unit(name: str, count: int, gathered: int, *, alike: int = 0, twice: int = 0, **other: Any) -> Unit:
        rates, split = p.state_rates, gathered - alike
        state = split * rates.get((name, True), 0.0) + alike * rates.get((name, False), 0.0)
        common: dict[str, Any] = {"axis": "dp_shard", "copies": "dp_replicate", "shards": layout.dp_shard}
        common |= {"bytes_each": c, "state": state, "freed": dense_freed and name != "root"}
        return Unit(name=name, count=count, gathered=gathered, replicated=alike, repeated=twice, **common | other)

    kinds = (
        unit("root", 1, p.root, alike=p.root),
        unit(
            "dense block",
            p.dense_blocks,
            p.dense_per_block - attention_saved - (feed_forward - feed_forward // tp),
            alike=p.dense_per_block - attention - feed_forward,
            twice=repeated,
        ),
        unit(
            "sparse block",
            p.sparse_blocks,
            p.sparse_per_block - attention_saved - (shared - shared // tp),
            alike=p.sparse_per_block - attention - shared,
            twice=repeated,
        ),
        unit("router", p.sparse_blocks, p.router_per_block, alike=p.router_per_block, bytes_each=4),
        unit("experts", p.sparse_blocks, p.experts_per_block // layout.ep, freed=experts_freed, **sharded_experts),
    )
    return tuple(kind for kind in kinds if kind.count)


def held_by_ranks(cfg: RunConfig, parameters: Parameters, layout: Layout) -> tuple[Held, ...]:
    """How every parameter lies on the ranks, for an optimizer that has to bring matrices together (its own arithmetic is
    `parallel.owners`, on the real boxes)."""
    found = []
    for name, shape in parameters.shapes:
        copies = layout.dp_replicate
        holders: tuple[range, ...] = (range(layout.world),)
        if ".experts." in name:
            copies, holders = layout.edp_replicate, _expert_holders(shape[0], layout)
        elif not is_split(name):
            copies *= layout.tp
        elif ".self_attention.key." in name or ".self_attention.value." in name:
            copies *= max(layout.tp // cfg.model.kv_heads, 1)
        found.append(Held(name=name, shape=shape, copies=copies, holders=holders))
    return tuple(found)


def _expert_holders(experts: int, layout: Layout) -> tuple[range, ...]:
    """Of each expert: one rank of each copy where FSDP can share whole experts out evenly, else all edp ranks
    of its ep rank."""
    here, shards, found = experts // layout.ep, layout.edp_shard, []
    for expert in range(experts):
        ep_rank, n = divmod(expert, here)
        if here % shards == 0:
            ep_rank += n // (here // shards) * layout.ep
            found.append(range(ep_rank, layout.world, layout.ep * shards))
        else:
            found.append(range(ep_rank, layout.world, layout.ep))
    return tuple(found)

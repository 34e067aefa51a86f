"""Bytes per collective of one optimizer step, and the links that carry them. One rank's view.

`message` is the full buffer as a profiler shows it: output of an all-gather, input of a reduce-scatter, the tensor of
an all-reduce, the rows sent by an all-to-all. What leaves a rank is less, and is split by link: with n ranks, m of
them on this node, on k nodes, and a hierarchical schedule in which the ranks of a node share the node's traffic,

    all-gather, reduce-scatter   inside M (m - 1) / m     between M (k - 1) / (k m)      together M (n - 1) / n
    all-reduce                   twice that
    all-to-all                   inside M (m - 1) / n     between M (n - m) / n
    broadcast                    as a gather: n - 1 copies leave n ranks

A call also waits for hops of a message from GPU to GPU: n - k in nodes and k - 1 between them (rings of gathers, reductions
and broadcasts), 2 (m - 1) and 2 log2 k (trees of all-reduces), m - 1 and n - m (a message for each peer of an all-to-all).
NCCL counts rings and trees so (its src/graph/tuning.cc); that an all-to-all's messages leave one after another is an upper bound.

Single numbers (the gradient's norm, the loss) are left out, but for the scales of 8-bit operands: there are thousands.

Expert exchange, per direction and sparse layer: f_c t d rows of `c` bytes, divided by tp, for t tokens of a rank.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

from ecdit_train.config.cluster import ClusterConfig
from ecdit_train.config.schema import HEAD_DIM, RunConfig

from . import low_precision, slots
from .layout import Group, Layout, blocks_again, element_bytes, held_by_ranks, units
from .parameters import Parameters

OPTIMIZER = "matrices to the ranks that update them, and back"
"""Purpose of what the optimizer sends."""

ROUTER_SELECTION = "router selection"
"""Purpose of what routers send in their own forward pass."""


@dataclass(frozen=True, kw_only=True)
class Flow:
    """One kind of collective with one purpose, summed over a step; bytes of one rank."""

    kind: str
    """all_gather, reduce_scatter, all_reduce, all_to_all or broadcast."""
    purpose: str
    axis: str
    ranks: int
    """That take part."""
    calls: int
    message: float
    intra_node: float
    """Sent inside the node."""
    inter_node: float
    """Sent to other nodes."""
    intra_steps: int
    """Hops between GPUs of a node that a call waits for, one after another."""
    inter_steps: int
    """Hops between nodes."""

    def seconds(self, *, intra_bandwidth: float, inter_bandwidth: float) -> float:
        """Of the bytes. Both kinds of link work at the same time; the slower one decides."""
        return max(self.intra_node / intra_bandwidth, self.inter_node / inter_bandwidth)

    def takes(self, cluster: ClusterConfig) -> float:
        """Seconds of bytes and calls."""
        return self.latency(cluster) + self.seconds(
            intra_bandwidth=cluster.intra_bandwidth, inter_bandwidth=cluster.inter_bandwidth
        )

    def latency(self, cluster: ClusterConfig) -> float:
        """Of the calls, whatever their size."""
        hops = self.intra_steps * cluster.intra_latency + self.inter_steps * cluster.inter_latency
        return self.calls * (cluster.call_latency + hops)


def per_step(cfg: RunConfig, parameters: Parameters, layout: Layout) -> tuple[Flow, ...]:
    """Every flow that carries bytes between ranks: weights and gradients unit by unit, tensors, agreement, experts, the
    optimizer, and what routers tell each other."""
    return (*before_update(cfg, parameters, layout), *_sending(_optimizer(cfg, parameters, layout)))


def before_update(cfg: RunConfig, parameters: Parameters, layout: Layout) -> tuple[Flow, ...]:
    """The same without the optimizer's."""
    flows = (
        *_weights(cfg, parameters, layout),
        *tensor_parallel(cfg, layout),
        *_agreement(cfg, parameters, layout),
        *experts(cfg, layout),
        *_selection(cfg, layout),
    )
    return _sending(flows)


def _sending(flows: Iterable[Flow]) -> tuple[Flow, ...]:
    return tuple(flow for flow in flows if flow.ranks > 1 and flow.calls)


def _weights(cfg: RunConfig, parameters: Parameters, layout: Layout) -> Iterator[Flow]:
    """FSDP: weights are gathered for forward of every microbatch, and again for backward where they were freed (the root never
    is); gradients are reduced in fp32 once a step, or in every microbatch, and then once over copies."""
    for unit in units(cfg, parameters, layout):
        calls, group = unit.count * (1 + unit.freed) * layout.microbatches, layout.group(unit.axis)
        reductions, gradients = unit.count * layout.reductions, 4 * unit.gathered
        yield _flow("all_gather", f"weights, {unit.name}", unit.axis, group, calls=calls, message=unit.gathered_bytes)
        what = f"gradients, {unit.name}"
        yield _flow("reduce_scatter", what, unit.axis, group, calls=reductions, message=gradients)
        what, copies, message = (
            f"gradients of replicas, {unit.name}",
            layout.group(unit.copies),
            gradients / unit.shards,
        )
        yield _flow("all_reduce", what, unit.copies, copies, calls=unit.count, message=message)


def tensor_parallel(cfg: RunConfig, layout: Layout) -> Iterator[Flow]:
    """Column/row pairs: the row output is summed in forward (again when it is recomputed and not kept), the gradient of
    everything that entered a column layer in backward: tokens, the text of cross-attention, the gates of sparse layers."""
    m, c, tp, micro = cfg.model, element_bytes(cfg), layout.group("tp"), layout.microbatches
    tokens, sparse = layout.microbatch * cfg.tokens_per_image, slots.sparse_blocks(cfg)
    dense, selective = m.layers - sparse, layout.activation_checkpointing == "selective"
    dense_again, sparse_again = blocks_again(dense, layout), blocks_again(sparse, layout)
    attentions, shared = 2 if m.cross_attention else 1, int(cfg.moe.shared_experts > 0)
    sums = 2 * (m.layers * attentions + dense + sparse * (1 + shared))
    # Selective keeps the sparse layers' sums, and those of products that it keeps.
    if not (selective and "projections" in layout.keep):
        sums += attentions * (dense_again + sparse_again)
    if not (selective and "feed_forward" in layout.keep):
        sums += dense_again + shared * sparse_again
    sums += 0 if selective else sparse_again
    text = layout.microbatch * slots.text_tokens(cfg) * m.text_width * c
    gates = tokens * slots.experts_per_token(cfg) * 4
    yield _flow("all_reduce", "tensor-parallel tokens", "tp", tp, calls=sums * micro, message=tokens * m.width * c)
    if m.cross_attention:
        yield _flow("all_reduce", "tensor-parallel text", "tp", tp, calls=micro, message=text)
    yield _flow("all_reduce", "tensor-parallel gates", "tp", tp, calls=sparse * micro, message=gates)
    if agreements := low_precision.agreements(cfg, layout):
        yield _flow("all_reduce", "scales of 8-bit operands", "tp", tp, calls=agreements, message=4.0)
    if layout.tp > m.kv_heads:
        calls, group = 2 * m.layers * micro, layout.group_of(layout.tp // m.kv_heads)
        what, message = "gradients of repeated kv heads", HEAD_DIM * m.width * c
        yield _flow("all_reduce", what, "tp", group, calls=calls, message=message)


def _agreement(cfg: RunConfig, parameters: Parameters, layout: Layout) -> Iterator[Flow]:
    """Once a step the first tp rank gives its fp32 gradient of what tp ranks hold alike to the others, one broadcast per
    number of copies (parallel/grads.agree)."""
    elements: Counter[int] = Counter()
    for unit in units(cfg, parameters, layout):
        elements[layout.tp] += unit.count * unit.replicated
        elements[layout.tp // cfg.model.kv_heads] += unit.count * unit.repeated
    for copies, held in sorted(elements.items()):
        if held and copies > 1:
            what, message = "gradients that tp ranks hold alike", 4 * held / layout.dp_shard
            yield _flow("broadcast", what, "tp", layout.group_of(copies), calls=1, message=message)


def experts(cfg: RunConfig, layout: Layout) -> Iterator[Flow]:
    """There and back, forward and backward; full checkpointing repeats the forward's. The lean form sends gates with the gradients
    of the results, four bytes a row, and gets their gradients back with those of the rows. A hierarchical exchange brings
    everything to the rank of its node that takes it across, and then across."""
    sparse, chunks = slots.sparse_blocks(cfg), layout.overlap_chunks
    again = blocks_again(sparse, layout) if layout.activation_checkpointing == "full" else 0
    calls, message = 2 * (2 * sparse + again) * chunks * layout.microbatches, exchange_bytes(cfg, layout)
    sent = [("tokens to experts and back", calls, message / chunks)]
    if layout.form == "lean":
        gates = message * 4 / (cfg.model.width * element_bytes(cfg))
        sent.append(("gates to experts and back", 2 * sparse * chunks * layout.microbatches, gates / chunks))
    group, node = layout.group("ep"), layout.gpus_per_node
    for what, calls, message in sent:
        if layout.exchange == "hierarchical":
            inside, across = layout.group_of(node), layout.group_of(layout.ep // node, stride=node)
            yield _flow("all_to_all", f"{what}, inside", "ep", inside, calls=calls, message=message)
            yield _flow("all_to_all", f"{what}, across", "ep", across, calls=calls, message=message)
        else:
            yield _flow("all_to_all", what, "ep", group, calls=calls, message=message)


def _optimizer(cfg: RunConfig, parameters: Parameters, layout: Layout) -> Iterator[Flow]:
    """Once a step, where the optimizer works on whole matrices; pieces and results together."""
    said = update(cfg, parameters, layout)
    if said.calls:
        group = layout.group("world")
        yield _flow("all_to_all", OPTIMIZER, "world", group, calls=said.calls, message=said.message / said.calls)


@dataclass(frozen=True, kw_only=True)
class Update:
    """What the optimizer says of its step."""

    flops: float
    """Of matrix products, on the busiest rank."""
    calls: int
    """All-to-alls."""
    message: float
    """Bytes of rank 0's buffers in all of them."""


def update(cfg: RunConfig, parameters: Parameters, layout: Layout) -> Update:
    """Asked once for each layout."""
    key = (layout.world, layout.dp_replicate, layout.dp_shard, layout.tp, layout.ep, layout.edp_replicate)
    if key not in parameters.updates:
        held = held_by_ranks(cfg, parameters, layout)
        calls, message = slots.optimizer_exchange(cfg, held, world=layout.world)
        flops = slots.optimizer_flops(cfg, held, world=layout.world)
        parameters.updates[key] = Update(flops=flops, calls=calls, message=message)
    return parameters.updates[key]


def _selection(cfg: RunConfig, layout: Layout) -> Iterator[Flow]:
    """Routers that select over the tokens of all ranks, as they say; full checkpointing repeats the forward's."""
    sparse = slots.sparse_blocks(cfg)
    again = blocks_again(sparse, layout) if layout.activation_checkpointing == "full" else 0
    calls = (sparse + again) * layout.microbatches
    messages = sorted(slots.router_messages(cfg, ranks=layout.dp), key=lambda message: message.kind)
    for kind, sent in groupby(messages, key=lambda message: message.kind):
        each = [message.bytes for message in sent]
        mean = sum(each) / len(each)
        yield _flow(kind, ROUTER_SELECTION, "dp", layout.group("dp"), calls=calls * len(each), message=mean)


def exchange_bytes(cfg: RunConfig, layout: Layout) -> float:
    """Bytes of the rows that one rank sends in one direction of one sparse layer: f_c t d c / tp."""
    tokens = layout.microbatch * cfg.tokens_per_image
    return slots.exchange_rows_per_token(cfg) * tokens * cfg.model.width * element_bytes(cfg) / layout.tp


def _flow(kind: str, purpose: str, axis: str, group: Group, *, calls: int, message: float) -> Flow:
    total, n, m, k = calls * message, group.size, group.per_node, group.nodes
    if kind == "all_to_all":
        intra, inter = total * (m - 1) / n, total * (n - m) / n
    else:
        passes = 2 if kind == "all_reduce" else 1
        intra, inter = passes * total * (m - 1) / m, passes * total * (k - 1) / (k * m)
    steps = (m - 1, n - m) if kind == "all_to_all" else ((n - k), k - 1)
    if kind == "all_reduce":
        steps = (2 * (m - 1), 2 * math.ceil(math.log2(k)))
    return Flow(
        kind=kind,
        purpose=purpose,
        axis=axis,
        ranks=n,
        calls=calls,
        message=total,
        intra_node=intra,
        inter_node=inter,
        intra_steps=steps[0],
        inter_steps=steps[1],
    )

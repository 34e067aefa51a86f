"""Bytes per collective of one optimizer step, and the links that carry them. One rank's view.

`message` is the full buffer as a profiler shows it: output of an all-gather, input of a reduce-scatter, the tensor of
an all-reduce, the rows sent by an all-to-all. What leaves a rank is less, and is split by link: with n ranks, m of
them on this node, on k nodes, and a hierarchical schedule in which the ranks of a node share the node's traffic,

    all-gather, reduce-scatter   inside M (m - 1) / m     between M (k - 1) / (k m)      together M (n - 1) / n
    all-reduce                   twice that
    all-to-all                   inside M (m - 1) / n     between M (n - m) / n
    broadcast                    as a gather: n - 1 copies leave n ranks

Single numbers (the gradient's norm, the loss) are left out.

Expert exchange, per direction and sparse layer: f_c t d rows of `c` bytes, divided by tp, for t tokens of a rank.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from ecdit_train.config.schema import HEAD_DIM, RunConfig

from .activations import element_bytes
from .layout import Group, Layout
from .parameters import Parameters
from .shards import units


@dataclass(frozen=True, kw_only=True)
class Flow:
    """One kind of collective with one purpose, summed over a step; bytes of one rank."""

    kind: str
    """all_gather, reduce_scatter, all_reduce, all_to_all or broadcast."""
    purpose: str
    axis: str
    size: int
    """Ranks that take part."""
    calls: int
    message: float
    intra: float
    """Sent inside the node."""
    inter: float
    """Sent to other nodes."""

    def seconds(self, *, intra_bandwidth: float, inter_bandwidth: float) -> float:
        """Both kinds of link work at the same time; the slower one decides."""
        return max(self.intra / intra_bandwidth, self.inter / inter_bandwidth)


def per_step(cfg: RunConfig, parameters: Parameters, layout: Layout) -> tuple[Flow, ...]:
    """Every flow that carries bytes between ranks, largest kinds first in source order: weights, tensors, experts."""
    flows = [
        *_weights(cfg, parameters, layout),
        *_tensor_parallel(cfg, layout),
        *_agreement(cfg, parameters, layout),
        *_experts(cfg, layout),
    ]
    return tuple(flow for flow in flows if flow.size > 1 and flow.calls)


def _weights(cfg: RunConfig, parameters: Parameters, layout: Layout) -> list[Flow]:
    """FSDP: weights are gathered for forward and again for backward of every microbatch (the root's once), gradients
    reduced in fp32 once a step."""
    flows = []
    for unit in units(cfg, parameters, layout):
        gathers = 2 if layout.reshard_after_forward and unit.name != "root" else 1
        axis, what = unit.axis, unit.name
        flows.append(
            _flow(
                "all_gather",
                f"weights, {what}",
                axis,
                layout.group(axis),
                message=unit.gathered_bytes,
                calls=unit.count * gathers * layout.microbatches,
            )
        )
        flows.append(
            _flow(
                "reduce_scatter",
                f"gradients, {what}",
                axis,
                layout.group(axis),
                calls=unit.count,
                message=unit.gathered * 4,
            )
        )
        if axis == "dp_shard":
            flows.append(
                _flow(
                    "all_reduce",
                    f"gradients of replicas, {what}",
                    "dp_replicate",
                    layout.group("dp_replicate"),
                    calls=unit.count,
                    message=unit.gathered * 4 / unit.shards,
                )
            )
    return flows


def _tensor_parallel(cfg: RunConfig, layout: Layout) -> list[Flow]:
    """Column/row pairs: the row output is summed in forward (again when it is recomputed), the gradient of everything
    that entered a column layer in backward: tokens, the text of cross-attention, the gates of sparse layers."""
    m, c, group, micro = cfg.model, element_bytes(cfg.train.precision), layout.group("tp"), layout.microbatches
    tokens = layout.microbatch * cfg.tokens_per_image
    mode = layout.activation_checkpointing
    again, sum_again = int(mode != "none"), int(mode == "full")  # selective keeps the sparse layers' sums
    text = layout.microbatch * cfg.encoders.text.max_tokens * m.text_width * c
    gates = tokens * cfg.moe.capacity_factor * 4
    sparse = 0 if cfg.moe.router == "dense" else m.layers // 2
    flows = [
        _flow(
            "all_reduce",
            "tensor-parallel tokens",
            "tp",
            group,
            message=tokens * m.width * c,
            calls=((3 * m.layers - sparse) * (2 + again) + sparse * (2 + sum_again)) * micro,
        ),
        _flow("all_reduce", "tensor-parallel text", "tp", group, calls=m.layers * micro, message=text),
        _flow("all_reduce", "tensor-parallel gates", "tp", group, calls=sparse * micro, message=gates),
    ]
    if layout.tp > m.kv_heads:
        share = Group(size=layout.tp // m.kv_heads, per_node=min(layout.tp // m.kv_heads, layout.gpus_per_node))
        flows.append(
            _flow(
                "all_reduce",
                "gradients of repeated kv heads",
                "tp",
                share,
                calls=2 * m.layers * micro,
                message=HEAD_DIM * m.width * c,
            )
        )
    return flows


def _agreement(cfg: RunConfig, parameters: Parameters, layout: Layout) -> list[Flow]:
    """Once a step the first tp rank gives its fp32 gradient of what tp ranks hold alike to the others, one broadcast per
    number of copies (parallel/grads.agree)."""
    elements: Counter[int] = Counter()
    for unit in units(cfg, parameters, layout):
        elements[layout.tp] += unit.count * unit.replicated
        elements[layout.tp // cfg.model.kv_heads] += unit.count * unit.repeated
    return [
        _flow(
            "broadcast",
            "gradients that tp ranks hold alike",
            "tp",
            Group(size=copies, per_node=min(copies, layout.gpus_per_node)),
            calls=1,
            message=4 * held / layout.dp_shard,
        )
        for copies, held in sorted(elements.items())
        if held and copies > 1
    ]


def _experts(cfg: RunConfig, layout: Layout) -> list[Flow]:
    """There and back, forward and backward; full checkpointing repeats the forward's."""
    if cfg.moe.router == "dense":
        return []
    repeats = 3 if layout.activation_checkpointing == "full" else 2
    message = exchange_bytes(cfg, layout) / layout.overlap_chunks
    return [
        _flow(
            "all_to_all",
            "tokens to experts and back",
            "ep",
            layout.group("ep"),
            message=message,
            calls=2 * repeats * layout.overlap_chunks * (cfg.model.layers // 2) * layout.microbatches,
        )
    ]


def exchange_bytes(cfg: RunConfig, layout: Layout) -> float:
    """Bytes of the rows that one rank sends in one direction of one sparse layer: f_c t d c / tp."""
    tokens = layout.microbatch * cfg.tokens_per_image
    return cfg.moe.capacity_factor * tokens * cfg.model.width * element_bytes(cfg.train.precision) / layout.tp


def _flow(kind: str, purpose: str, axis: str, group: Group, *, calls: int, message: float) -> Flow:
    total, n, m, k = calls * message, group.size, group.per_node, group.nodes
    if kind == "all_to_all":
        intra, inter = total * (m - 1) / n, total * (n - m) / n
    else:
        passes = 2 if kind == "all_reduce" else 1
        intra, inter = passes * total * (m - 1) / m, passes * total * (k - 1) / (k * m)
    return Flow(kind=kind, purpose=purpose, axis=axis, size=n, calls=calls, message=total, intra=intra, inter=inter)

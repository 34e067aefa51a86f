"""A plan as JSON, and as text for a terminal. Keys of the JSON are stable; numbers are plain, units in the table.

key                          value
---------------------------  ---------------------------------------------------------------------------------------
experiment, cluster, world   names of the run and the machine room; ranks
parameters.total             parameters, frozen encoders inside, as the paper counts
parameters.activated         the same with capacity_factor experts per sparse layer
parameters.network           the trained network only
parameters.encoders          frozen text encoder and image codec
parameters.by_part           {part: parameters} of the trained network (plan/parameters.py: PARTS)
table1                       null, or row, printed_total, total_deviation, printed_activated, activated_deviation, note
flops_per_step               model FLOPs of an optimizer step over all ranks (forward + 2 x backward)
flops.by_part                {part: model FLOPs}
flops.recompute              FLOPs repeated by activation checkpointing
flops.in_8_bits              of the model's FLOPs, those of 8-bit products (train.precision=fp8)
flops.recompute_in_8_bits    of the repeated ones, the same
flops.frozen_encoders        FLOPs of frozen encoders that run inside training
optimizer_flops              FLOPs of the update's matrix products, on the busiest rank (0: it is element-wise)
layout                       dp_replicate, dp_shard, tp, ep, edp, microbatch, microbatches, activation_checkpointing, keep,
                             checkpoint_blocks, overlap_chunks, exchange, reshard_after_forward, reduce_gradients,
                             replicate_experts, form (moe.form)
memory_per_rank.<part>       bytes: parameters, gradients, optimizer, ema, gathered, communication, activations,
                             fp8_history, prepared_batches, encoders, framework, never_together (plan/memory.py)
memory_per_rank.total        the peak: the sum of the parts, less never_together
fits, gpu_memory             whether total <= gpu_memory; bytes per GPU
min_nodes                    fewest nodes on which this layout fits; null if none up to 512
traffic_per_step.<kind>      bytes of one rank and step: message, intra_node, inter_node; kinds all_gather,
                             reduce_scatter, all_reduce, all_to_all, broadcast
traffic_per_step.flows       the same by purpose: kind, purpose, axis, ranks, calls, message, intra_node, inter_node; hops
                             between GPUs that a call waits for: intra_steps, inter_steps
exchange_bytes               bytes one rank sends in one direction of one sparse layer and microbatch
stages                       first, last (updates made), experts_per_token, flops_per_step, seconds (of a step) and
                             memory_total of each stretch without a change of shapes; everything else here is of the
                             slowest, with the largest memory of any; parameters.activated is of the last
step_time                    seconds and its parts, bounds best and worst, mfu, mfu_ceiling, tokens_per_second,
                             images_per_second_per_gpu (plan/cost.py)
checkpoint_bytes             bytes of one committed checkpoint
suggested_layout             null, or layout, overrides (for the command line), memory_total, seconds, mfu
suggested_min_nodes          fewest nodes on which any layout that was searched fits; null if none
warnings                     sentences
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table

from .cost import Cost
from .layout import CHOSEN
from .plan import Plan
from .search import overrides
from .traffic import exchange_bytes

KINDS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "broadcast")
WIDTH = 200
"""Columns of the text, whatever terminal or pipe it goes to: what is longer is wrapped."""
BAR = 24
"""Width of the memory bars, characters."""

LAYOUT = (
    *("dp_replicate", "dp_shard", "tp", "ep", "edp", "microbatch", "microbatches"),
    *CHOSEN,
    *("replicate_experts", "form"),
)


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain values for `json.dumps`; keys as in the module's table."""
    cfg, cost, best = plan.cfg, plan.cost, plan.suggested
    sent = ("message", "intra_node", "inter_node")
    return {
        "experiment": cfg.experiment,
        "cluster": cfg.cluster.name,
        "world": cost.layout.world,
        "parameters": _pick(plan.parameters, "total", "activated", "network", "encoders", "by_part"),
        "table1": dataclasses.asdict(plan.table1) if plan.table1 else None,
        "flops_per_step": cost.flops.model,
        "flops": dataclasses.asdict(cost.flops),
        "optimizer_flops": cost.optimizer_flops,
        "layout": _pick(cost.layout, *LAYOUT),
        "memory_per_rank": {**dataclasses.asdict(cost.memory), "total": cost.memory.total},
        "fits": cost.fits,
        "gpu_memory": cfg.cluster.gpu_memory,
        "min_nodes": plan.min_nodes,
        "traffic_per_step": {
            **{k: {name: sum(getattr(f, name) for f in cost.traffic if f.kind == k) for name in sent} for k in KINDS},
            "flows": [dataclasses.asdict(flow) for flow in cost.traffic],
        },
        "exchange_bytes": exchange_bytes(cfg, cost.layout) if cost.layout.ep > 1 else 0.0,
        "stages": [
            _pick(stage, "first", "last", "experts_per_token")
            | {
                "flops_per_step": stage.cost.flops.model,
                "seconds": stage.cost.step_time.seconds,
                "memory_total": stage.cost.memory.total,
            }
            for stage in plan.stages
        ],
        "step_time": dataclasses.asdict(cost.step_time),
        "checkpoint_bytes": plan.checkpoint_bytes,
        "suggested_layout": None
        if best is None
        else {
            "layout": _pick(best.layout, *LAYOUT),
            "overrides": list(overrides(cfg, best.layout)),
            "memory_total": best.memory.total,
            **_pick(best.step_time, "seconds", "mfu"),
        },
        "suggested_min_nodes": plan.suggested_min_nodes,
        "warnings": list(plan.warnings),
    }


def _pick(source: object, *names: str) -> dict[str, Any]:
    found = {name: getattr(source, name) for name in names}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


# --- text --------------------------------------------------------------------------------------------------------


def render(plan: Plan) -> str:
    """Sections: verdict, parameters, layout, memory, step, stages, traffic, suggestion, warnings."""
    cfg, at = plan.cfg, plan.cost.layout
    title = f"{cfg.experiment} on {_count(at.world, 'rank')}, {_count(-(-at.world // at.gpus_per_node), 'node')}"
    return show(
        [f"{title} ({cfg.cluster.name})", verdict(plan)],
        {
            "parameters": _parameters(plan),
            "layout": _layout(plan.cost),
            "memory per rank": _memory(plan),
            "step": _step(plan.cost),
            "stages (what else is said is of the slowest, with the largest memory of any)": _stages(plan),
            "traffic per rank and step": _traffic(plan),
            "faster layout on the same ranks": _suggestion(plan),
            "warnings": [f"- {line}" for line in plan.warnings],
        },
    )


Line = str | Table


def show(head: Sequence[str], sections: Mapping[str, Sequence[Line]]) -> str:
    """Lines and tables as plain text: the head, then every section that has a line, under its name and indented."""
    console = Console(file=io.StringIO(), width=WIDTH, color_system=None, markup=False, emoji=False, highlight=False)
    with console.capture() as captured:
        console.print(*head, sep="\n")
        for name, lines in sections.items():
            if lines:
                console.print(f"\n{name}")
                console.print(Padding(Group(*lines), (0, 0, 0, 2)))
    return "".join(f"{line.rstrip()}\n" for line in captured.get().splitlines())


def verdict(plan: Plan) -> str:
    """The one line that answers the question."""
    cost, total, room = plan.cost, plan.cost.memory.total, plan.cfg.cluster.gpu_memory
    head = f"fits: {'yes' if plan.fits else 'NO'}, {_of(total, room)}"
    if not plan.fits:
        least = plan.min_nodes or plan.suggested_min_nodes
        return head + (
            f"; smallest that fits: {_count(least, 'node')}" if least else "; no number of nodes up to 512 fits"
        )
    step = cost.step_time
    rate = f"{step.images_per_second_per_gpu:.3g} images/s/GPU"
    return (
        f"{head}; {seconds(step.seconds)} a step, {step.mfu:.0%} MFU, {rate}; "
        f"{plan.cfg.train.steps:,} steps in {duration(plan.seconds)}"
    )


def _parameters(plan: Plan) -> list[Line]:
    p = plan.parameters
    lines: list[Line] = [
        f"total {number(p.total)}, active per token {number(p.activated)}, trained {number(p.network)}"
        + (f", frozen encoders {number(p.encoders)}" if p.encoders else "")
    ]
    if t := plan.table1:
        lines.append(
            f"paper's Table 1, {t.row}: total {number(t.printed_total)} ({t.total_deviation:+.1%}), "
            f"active {number(t.printed_activated)} ({t.activated_deviation:+.1%})"
        )
        if t.note:
            lines.append(f"  {t.note}")
    rows = [(part.replace("_", " "), number(n), f"{n / p.network:.1%}") for part, n in p.by_part.items() if n]
    return [*lines, table(rows)]


def _layout(cost: Cost) -> list[str]:
    at = cost.layout
    dense = f"dense view: dp_replicate {at.dp_replicate} x dp_shard {at.dp_shard} x tp {at.tp}"
    sparse = f"edp {at.edp} x ep {at.ep}" + (
        f", {at.edp_replicate} copies of all experts" if at.replicate_experts else ""
    )
    mode, share = (
        at.activation_checkpointing,
        "" if at.checkpoint_blocks == 1 else f" of {at.checkpoint_blocks:.0%} of the blocks",
    )
    keeps = f", which keeps {', '.join(at.keep)}" if at.keep else ""
    freed = {
        "all": "all weights",
        "dense": "all weights but experts'",
        "experts": "experts' weights",
        "none": "no weights",
    }
    reduced = "" if at.microbatches == 1 else f"; gradients reduced once a {at.reduce_gradients}"
    return [
        f"{dense}; sparse view: {sparse}",
        f"{at.microbatch} images per rank and microbatch, "
        f"{_count(at.microbatches, 'microbatch', 'microbatches')} a step; {at.form} sparse layers",
        f"checkpointing {mode}{share}{keeps}; {freed[at.reshard_after_forward]} freed after forward{reduced}",
        *([f"{at.exchange} exchange in {_count(at.overlap_chunks, 'part')}"] if at.ep > 1 else []),
    ]


def _memory(plan: Plan) -> list[Line]:
    memory, room = plan.cost.memory, plan.cfg.cluster.gpu_memory
    parts = {**dataclasses.asdict(memory), "total": memory.total}
    apart = parts.pop("never_together")
    rows = [
        (name.replace("_", " "), size(value), f"{value / room:.1%}", "#" * round(BAR * value / max(room, memory.total)))
        for name, value in parts.items()
        if value
    ]
    if apart:
        rows.insert(-1, ("gradients and activations do not peak together", size(-apart), f"{-apart / room:.1%}", ""))
    nodes = f"this layout fits from {_count(plan.min_nodes, 'node')} on" if plan.min_nodes else "this layout never fits"
    any_layout = f", any layout from {_count(plan.suggested_min_nodes, 'node')} on" if plan.suggested_min_nodes else ""
    return [table(rows), f"{nodes}{any_layout}; a checkpoint is {size(plan.checkpoint_bytes)}"]


def _step(cost: Cost) -> list[Line]:
    s, f, at = cost.step_time, cost.flops, cost.layout
    rows = [
        ("matrix products", s.products, None),
        ("element-wise", s.elementwise, None),
        *([("casts to 8 bits", s.casts, None)] if s.casts else []),
        ("copies of weights and gradients", s.copies, None),
        ("optimizer", s.optimizer, None),
        *([("optimizer's exchange", s.optimizer_exchange, s.optimizer_exchange)] if s.optimizer_exchange else []),
        *([("expert exchange", s.exchange, s.exchange_exposed)] if at.ep > 1 else []),
        *([("weights and gradients", s.weights, s.weights_exposed)] if at.dp > 1 else []),
        *([("tensor parallel", s.tensor_parallel, s.tensor_parallel)] if at.tp > 1 else []),
    ]
    return [
        f"{seconds(s.seconds)} (between {seconds(s.best)} with all communication hidden "
        f"and {seconds(s.worst)} with none)",
        f"MFU {s.mfu:.1%}, ceiling {s.mfu_ceiling:.1%}; {number(s.tokens_per_second)} tokens/s, "
        f"{s.images_per_second_per_gpu:.3g} images/s/GPU",
        f"model FLOPs {_pflop(f.model)}; recomputed {_pflop(f.recompute)}; frozen encoders {_pflop(f.frozen_encoders)}"
        + (f"; optimizer {_pflop(cost.optimizer_flops)} on the busiest rank" if cost.optimizer_flops else ""),
        table([(what, seconds(all_), "" if out is None else f"{seconds(out)} exposed") for what, all_, out in rows]),
    ]


def _stages(plan: Plan) -> list[Line]:
    if len(plan.stages) == 1:
        return []
    header = ("steps", "experts per token", "model FLOPs", "a step", "MFU", "memory", "in all")
    rows = [
        (
            f"{at.first:,} to {at.last:,}",
            f"{at.experts_per_token:g}",
            _pflop(at.cost.flops.model),
            seconds(at.cost.step_time.seconds),
            f"{at.cost.step_time.mfu:.0%}",
            size(at.cost.memory.total),
            duration(at.seconds),
        )
        for at in plan.stages
    ]
    return [table(rows, header=header)]


def _traffic(plan: Plan) -> list[Line]:
    flows = plan.cost.traffic
    if not flows:
        return []
    header = ("collective", "ranks", "calls", "buffer", "in node", "between", "what")
    rows = [
        (
            f.kind.replace("_", "-"),
            str(f.ranks),
            str(f.calls),
            *map(size, (f.message, f.intra_node, f.inter_node)),
            f.purpose,
        )
        for f in flows
    ]
    lines: list[Line] = [table(rows, header=header)]
    if plan.cost.layout.ep > 1:
        lines.append(
            f"an exchange sends {size(exchange_bytes(plan.cfg, plan.cost.layout))} per rank, direction and layer"
        )
    return lines


def _suggestion(plan: Plan) -> list[str]:
    best = plan.suggested
    if best is None:
        return []
    gain = f", {plan.cost.step_time.seconds / best.step_time.seconds:.2f} times as fast" if plan.fits else ""
    return [
        f"{seconds(best.step_time.seconds)} a step, {best.step_time.mfu:.0%} MFU, "
        f"{_of(best.memory.total, plan.cfg.cluster.gpu_memory)}{gain}",
        " ".join(overrides(plan.cfg, best.layout)),
    ]


# --- human units -----------------------------------------------------------------------------------------------


def table(rows: Iterable[Sequence[str]], *, header: Sequence[str] = ()) -> Table:
    """Columns as wide as their widest cell; all but the first and the last to the right."""
    rows = list(rows)
    grid = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=bool(header), header_style=None)
    last = len(rows[0]) - 1
    for n, name in enumerate(header or rows[0]):
        grid.add_column(name, justify="left" if n in (0, last) else "right", no_wrap=True)
    for row in rows:
        grid.add_row(*row)
    return grid


def number(value: float) -> str:
    """1234567 -> 1.23M."""
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(value) >= scale:
            return f"{value / scale:.2f}{unit}"
    return f"{value:.0f}"


def size(value: float) -> str:
    """Bytes in decimal units, as GPUs and links are sold."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if abs(value) >= scale:
            return f"{value / scale:.1f} {unit}"
    return f"{value:.0f} B"


def seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.0f} ms"


def duration(value: float) -> str:
    for unit, scale in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if value >= 2 * scale:
            return f"{value / scale:.1f} {unit}"
    return f"{value:.0f} s"


def _of(value: float, room: float) -> str:
    return f"{value / 1e9:.1f} of {room / 1e9:.0f} GB" if room >= 1e9 else f"{size(value)} of {size(room)}"


def _count(value: int | None, name: str, plural: str | None = None) -> str:
    return f"{value} {name if value == 1 else plural or name + 's'}"


def _pflop(value: float) -> str:
    return f"{value / 1e15:.2f} PFLOP" if value >= 1e13 else f"{value / 1e12:.3g} TFLOP"

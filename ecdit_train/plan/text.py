"""A plan as text for a terminal: the verdict first, then what it rests on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from . import document
from .plan import Cost, Plan
from .suggest import overrides
from .traffic import exchange_bytes

BAR = 24
"""Width of the memory bars, characters."""


def render(plan: Plan) -> str:
    """Sections: verdict, parameters, layout, memory, step, traffic, suggestion, warnings."""
    cfg, cost = plan.cfg, plan.cost
    title = f"{cfg.experiment} on {_ranks(cost)} ({cfg.cluster.name})"
    sections = [
        ("", [title, verdict(plan)]),
        ("parameters", _parameters(plan)),
        ("layout", _layout(cost)),
        ("memory per rank", _memory(plan)),
        ("step", _step(plan)),
        ("traffic per rank and step", _traffic(plan)),
        ("faster layout on the same ranks", _suggestion(plan)),
        ("warnings", [f"- {line}" for line in plan.warnings]),
    ]
    return (
        "\n\n".join(
            "\n".join([*([name] if name else []), *(f"  {line}" if name else line for line in lines)])
            for name, lines in sections
            if lines
        )
        + "\n"
    )


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
        f"{plan.cfg.train.steps:,} steps in {duration(step.seconds * plan.cfg.train.steps)}"
    )


def _parameters(plan: Plan) -> list[str]:
    p, lines = plan.parameters, []
    lines.append(
        f"total {number(p.total)}, active per token {number(p.activated)}, trained {number(p.network)}"
        + (f", frozen encoders {number(p.encoders)}" if p.encoders else "")
    )
    if plan.table1:
        t = plan.table1
        lines.append(
            f"paper's Table 1, {t.row}: total {number(t.printed_total)} ({t.total_deviation:+.1%}), "
            f"active {number(t.printed_activated)} ({t.activated_deviation:+.1%})"
        )
        if t.note:
            lines.append(f"  {t.note}")
    rows = [(part.replace("_", " "), number(n), f"{n / p.network:.1%}") for part, n in p.by_part.items() if n]
    return [*lines, *table(rows)]


def _layout(cost: Cost) -> list[str]:
    at = cost.layout
    dense = f"dense view: dp_replicate {at.dp_replicate} x dp_shard {at.dp_shard} x tp {at.tp}"
    return [
        f"{dense}; sparse view: edp {at.edp} x ep {at.ep}",
        f"{at.microbatch} images per rank and microbatch, "
        f"{_count(at.microbatches, 'microbatch', 'microbatches')} a step; "
        f"checkpointing {at.activation_checkpointing}, overlap_chunks {at.overlap_chunks}",
    ]


def _memory(plan: Plan) -> list[str]:
    parts = document.memory_json(plan.cost.memory)
    room = plan.cfg.cluster.gpu_memory
    rows = [
        (name, size(value), f"{value / room:.1%}", "#" * round(BAR * value / max(room, parts["total"])))
        for name, value in parts.items()
        if value and name != "never_together"
    ]
    if apart := parts["never_together"]:
        rows.insert(-1, ("gradients and activations do not peak together", size(-apart), f"{-apart / room:.1%}", ""))
    nodes = f"this layout fits from {_count(plan.min_nodes, 'node')} on" if plan.min_nodes else "this layout never fits"
    any_layout = f", any layout from {_count(plan.suggested_min_nodes, 'node')} on" if plan.suggested_min_nodes else ""
    return [*table(rows), f"{nodes}{any_layout}; a checkpoint is {size(plan.checkpoint_bytes)}"]


def _step(plan: Plan) -> list[str]:
    s, f, at = plan.cost.step_time, plan.cost.flops, plan.cost.layout
    lines = [
        f"{seconds(s.seconds)} (between {seconds(s.best)} with all communication hidden "
        f"and {seconds(s.worst)} with none)",
        f"MFU {s.mfu:.1%}, ceiling {s.mfu_ceiling:.1%}; {number(s.tokens_per_second)} tokens/s, "
        f"{s.images_per_second_per_gpu:.3g} images/s/GPU",
        f"model FLOPs {_pflop(f.model)}; recomputed {_pflop(f.recompute)}; frozen encoders {_pflop(f.frozen_encoders)}",
    ]
    rows = [
        ("matrix products", seconds(s.products), ""),
        ("element-wise", seconds(s.elementwise), ""),
        ("optimizer", seconds(s.optimizer), ""),
        ("expert exchange", seconds(s.exchange), f"{seconds(s.exchange_exposed)} exposed"),
        ("weights and gradients", seconds(s.weights), f"{seconds(s.weights_exposed)} exposed"),
        ("tensor parallel", seconds(s.tensor_parallel), f"{seconds(s.tensor_parallel)} exposed"),
    ]
    kept = [row for row, keep in zip(rows, (True, True, True, at.ep > 1, at.dp > 1, at.tp > 1), strict=True) if keep]
    return [*lines, *table(kept)]


def _traffic(plan: Plan) -> list[str]:
    flows = plan.cost.traffic
    if not flows:
        return []
    header = ("collective", "ranks", "calls", "buffer", "in node", "between", "what")
    rows = [
        (f.kind.replace("_", "-"), str(f.size), str(f.calls), size(f.message), size(f.intra), size(f.inter), f.purpose)
        for f in flows
    ]
    lines = table([header, *rows])
    if any(f.kind == "all_to_all" for f in flows):
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
        " ".join(overrides(best.layout)),
    ]


# --- human units -----------------------------------------------------------------------------------------------


def table(rows: Iterable[Sequence[str]]) -> list[str]:
    """Columns padded to their widest cell; all but the first and the last to the right."""
    rows = [list(row) for row in rows]
    if not rows:
        return []
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    last = len(widths) - 1
    return [
        "  ".join(
            cell.ljust(w) if i in (0, last) else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


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


def _ranks(cost: Cost) -> str:
    at = cost.layout
    nodes = -(-at.world // at.gpus_per_node)
    return f"{_count(at.world, 'rank')}, {_count(nodes, 'node')}"

"""A dry run held against the formulas of the plan: bytes per kind of collective, and memory."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import activations, memory, traffic
from .plan import Plan
from .shards import units
from .text import seconds, size, table

if TYPE_CHECKING:
    from .dry_run import DryRun

TOLERANCE = 0.10
"""A formula may be this far from the dry run, relative."""

AFTER_BACKWARD = ("broadcast",)
"""Kinds that only clipping issues (parallel/grads.agree): a dry run ends with backward, so there is nothing to compare."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One quantity, computed twice; bytes of one rank and one microbatch."""

    name: str
    formula: float
    measured: float

    @property
    def relative(self) -> float:
        """formula / measured - 1; 0 where both are nothing."""
        if not self.measured:
            return 0.0 if not self.formula else float("inf")
        return self.formula / self.measured - 1

    @property
    def within(self) -> bool:
        return abs(self.relative) <= TOLERANCE


def compare(plan: Plan, dry_run: DryRun) -> tuple[Difference, ...]:
    """Collectives by kind (without AFTER_BACKWARD), then memory by part. The dry run is one microbatch, so the formulas
    are asked about one as well."""
    cfg, parameters = plan.cfg, plan.parameters
    layout = dataclasses.replace(plan.cost.layout, microbatches=1)
    flows = [flow for flow in traffic.per_step(cfg, parameters, layout) if flow.kind not in AFTER_BACKWARD]
    kinds = sorted({flow.kind for flow in flows} | {c.kind for c in dry_run.collectives})
    rows = [
        Difference(
            name=kind,
            formula=sum(f.message for f in flows if f.kind == kind),
            measured=sum(c.bytes for c in dry_run.collectives if c.kind == kind),
        )
        for kind in kinds
    ]
    m, root = memory.estimate(cfg, parameters, layout), units(cfg, parameters, layout)[0]
    running = m.parameters + m.gradients + m.gathered + m.communication + m.activations - m.never_together
    between = root.gathered_bytes if layout.reshard_after_forward else m.gathered
    pairs = (
        ("parameters", m.parameters, dry_run.parameters),
        ("gradients", m.gradients, dry_run.gradients),
        ("optimizer", m.optimizer, dry_run.optimizer),
        ("gathered between forward and backward", between, dry_run.gathered),
        ("activations kept", activations.estimate(cfg, layout).kept, dry_run.activations_kept),
        ("peak of forward and backward", running, dry_run.peak),
    )
    return (*rows, *(Difference(name=name, formula=formula, measured=measured) for name, formula, measured in pairs))


def to_json(dry_run: DryRun, rows: tuple[Difference, ...]) -> dict[str, Any]:
    """{"dry_run": {...}, "differences": [{name, formula, measured, relative, within}]}."""
    differences = [
        {"name": r.name, "formula": r.formula, "measured": r.measured, "relative": r.relative, "within": r.within}
        for r in rows
    ]
    return {"dry_run": dataclasses.asdict(dry_run), "differences": differences}


def render(dry_run: DryRun, rows: tuple[Difference, ...]) -> str:
    """Verdict first, then formula and dry run side by side."""
    off = [row.name for row in rows if not row.within]
    verdict = f"formulas off by more than {TOLERANCE:.0%}: {', '.join(off)}" if off else f"all within {TOLERANCE:.0%}"
    head = (
        f"dry run of rank 0 of {dry_run.world}, one microbatch: {verdict} "
        f"({seconds(dry_run.seconds)}, {size(dry_run.resident)} of memory)"
    )
    lines = table(
        [
            ("", "formula", "dry run", "off"),
            *((r.name, size(r.formula), size(r.measured), f"{r.relative:+.1%}") for r in rows),
        ]
    )
    return "\n".join([head, "", *(f"  {line}" for line in lines)]) + "\n"

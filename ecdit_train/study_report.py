"""A routing study told: the numbers of one run, the table over seeds, the panels of the plot. Needs no torch."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a finished run shows."""

    arm: str
    seed: int
    words: tuple[str, ...]
    flops: float
    """Model FLOPs of a step."""
    train_loss: float
    unseen_loss: float
    """On unseen pictures, averaged weights, mean over timesteps."""
    right: float
    """Share of drawn pictures that are what their prompt says."""
    drawn: int
    """Pictures that were graded."""
    chance: float
    """What true pictures of other prompts would get."""
    experts_drawn: float | None
    """Experts per token while drawing, layers and timesteps together; None without experts."""
    budget: float | None
    """What the router aims at."""
    on_object: float | None
    on_background: float | None
    max_violation: float | None
    combination_usage: float | None
    timestep_sensitivity: float | None
    step_seconds: float
    """Median over log records."""


COLUMNS: Mapping[str, tuple[str, str]] = {
    "unseen_loss": ("loss, unseen", ".4f"),
    "train_loss": ("loss, train", ".4f"),
    "right": ("right", ".1%"),
    "experts_drawn": ("experts drawn", ".2f"),
    "on_object": ("on objects", ".2f"),
    "on_background": ("on background", ".2f"),
    "max_violation": ("MaxVio", ".2f"),
    "combination_usage": ("pairs used", ".0%"),
    "timestep_sensitivity": ("t share", ".2f"),
}


def text(found: Sequence[Measured], *, steps: int, batch: int, failed: Sequence[str] = ()) -> str:
    """Markdown: mean and, from two seeds on, sample standard deviation over seeds; costs relative to the first arm."""
    by_arm = _by_arm(found)
    first = next(iter(by_arm.values()))
    heads = ["router", "seeds", "planned FLOPs", *(head for head, _ in COLUMNS.values()), "time"]
    rows = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    time = statistics.fmean(m.step_seconds for m in first)
    for arm, runs in by_arm.items():
        cells = [_cell([getattr(m, name) for m in runs], form) for name, (_, form) in COLUMNS.items()]
        seconds = statistics.fmean(m.step_seconds for m in runs) / time
        rows.append([arm, str(len(runs)), f"{runs[0].flops / first[0].flops:.3f}", *cells, f"{seconds:.2f}"])
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    table = ["| " + " | ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    chance = statistics.fmean(m.chance for m in found)
    drawn = found[0].drawn
    budget = ", ".join(sorted({f"{m.budget:g}" for m in found if m.budget is not None})) or "none"
    notes = f"""
{steps} steps of {batch} images; mean ± standard deviation over seeds. FLOPs of a step, as planned, and time per step are relative
to {found[0].arm}; times are of one machine, one run after another.

- Pictures are drawn and looked at one by one, all patches (`sample.scope=image`), whatever competed in training: there
  expert_choice and bl choose as ec_image does, and be, with one image, as tc. What is fixed then says nothing of what was learned.
- loss, unseen: mean squared velocity error on pictures that were not trained on, at t = 0.1 to 0.9, averaged weights
- right: drawn pictures of a coloured shape that are what their prompt says ({chance:.1%} by chance); {drawn} pictures
  a run, so a share p has a standard error of sqrt(p (1 - p) / {drawn})
- experts drawn: per token while drawing, captioned half, some timesteps (budget {budget}); on objects, on background: per patch of
  the unseen pictures
- MaxVio, pairs used: overload of the busiest expert; share of expert pairs that cover 95 % of co-activations
- t share: variance of affinities that the timestep alone makes, tokens staying
"""
    if failed:
        notes += "\nNot in the table, for they failed:\n\n" + "".join(f"- {line}\n" for line in failed)
    return "\n".join(table) + "\n" + notes


def panels(found: Sequence[Measured]) -> list[tuple[str, dict[str, list[float]]]]:
    """(what, arm -> a value for each seed) for the plot."""
    by_arm = _by_arm(found)
    first = statistics.fmean(m.step_seconds for m in next(iter(by_arm.values())))
    return [
        ("loss on unseen pictures", {arm: [m.unseen_loss for m in runs] for arm, runs in by_arm.items()}),
        ("right pictures, %", {arm: [100 * m.right for m in runs] for arm, runs in by_arm.items()}),
        (
            "experts on objects / on background",
            {
                arm: [m.on_object / m.on_background for m in runs if m.on_object is not None and m.on_background]
                for arm, runs in by_arm.items()
            },
        ),
        ("time per step, relative", {arm: [m.step_seconds / first for m in runs] for arm, runs in by_arm.items()}),
    ]


def _by_arm(found: Sequence[Measured]) -> dict[str, list[Measured]]:
    by_arm: dict[str, list[Measured]] = {}
    for measured in found:
        by_arm.setdefault(measured.arm, []).append(measured)
    return by_arm


def _cell(values: Sequence[Any], form: str) -> str:
    if any(v is None for v in values):
        return "-"
    spread = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{form}}{spread}"

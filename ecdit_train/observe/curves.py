"""What a log has to draw: its values in columns, and which of them share a chart."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from .metrics import METRICS, Metric, metric_key

Records = Sequence[Mapping[str, Any]]

MAX_ROWS = 1500
"""Rows of a log that a page holds; a longer log is put together row by row: means, and of `_max` metrics the largest."""
MAX_VALUES = 200_000
"""Numbers that a page holds; with hundreds of curves it has fewer rows."""
MIN_ROWS = 200
UNKNOWN = Metric(unit="", reduction="mean", question="")


def about(key: str) -> Metric:
    """What a logged name means; before a colon stands the run that logged it, where there are several."""
    return METRICS.get(metric_key(key.rpartition(":")[2]), UNKNOWN)


PALETTE = ("#3b82f6", "#d97706", "#0f9d76", "#ec4899", "#8b5cf6", "#0891b2", "#65a30d", "#ef4444", "#64748b", "#a16207")
"""At least 3:1 against the page, light and dark."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """A log by columns. A row is a record, or several neighbours of a long log."""

    steps: list[int]
    hours: list[float]
    """Since the first record."""
    images: list[float] | None
    """Seen by then; None where it was not logged."""
    values: dict[str, list[float | None]]
    """A number for every row; None where it was not logged."""
    broken: dict[str, list[int]]
    """Rows in which the value was not finite: there a curve has a gap."""
    last: float | None
    """When the last record was written, in seconds since the epoch."""

    def series(self, key: str) -> tuple[list[float], list[float | None]]:
        """(steps, values) of the rows that have the metric; None where it was not finite."""
        gaps = set(self.broken.get(key, ()))
        rows = [n for n, v in enumerate(self.values.get(key, ())) if v is not None or n in gaps]
        return [float(self.steps[n]) for n in rows], [self.values[key][n] for n in rows]

    def document(self) -> dict[str, Any]:
        """As charts.js reads it: a metric that few rows have says which."""
        packed = {}
        for key, column in self.values.items():
            gaps = set(self.broken.get(key, ()))
            rows = [n for n, v in enumerate(column) if v is not None or n in gaps]
            whole = len(rows) == len(column)
            packed[key] = {"at": None if whole else rows, "y": [_cut(column[n]) for n in rows]}
        return {
            "step": self.steps,
            "time": [round(h, 5) for h in self.hours],
            "images": self.images,
            "series": packed,
            "last": self.last,
        }


def columns(records: Records, *, only: Sequence[str] | None = None) -> Columns:
    """`only`: these metrics, else every number of the records."""
    records = [r for r in records if isinstance(r.get("step"), int)]
    names = dict.fromkeys(k for r in records for k, v in r.items() if v is None or _number(v))
    reductions = {k: about(k).reduction for k in names if k not in ("step", "time") and (only is None or k in only)}
    rows = min(len(records), MAX_ROWS, max(MIN_ROWS, MAX_VALUES // max(1, len(reductions))))
    spans = list(pairwise(len(records) * i // rows for i in range(rows + 1))) if rows else []
    values: dict[str, list[float | None]] = {key: [None] * rows for key in reductions}
    broken: dict[str, list[int]] = {}
    for row, (a, b) in enumerate(spans):
        found: dict[str, list[Any]] = {}
        for record in records[a:b]:
            for key, value in record.items():
                if key in reductions:
                    found.setdefault(key, []).append(value)
        for key, here in found.items():
            finite = [float(v) for v in here if _number(v) and math.isfinite(v)]
            if finite:
                values[key][row] = _together(finite, reductions[key])
            else:
                broken.setdefault(key, []).append(row)
    times = [float(r["time"]) if _number(r.get("time")) else None for r in records]
    start = next((t for t in times if t is not None), 0.0)
    ends = [b - 1 for _, b in spans]
    hours = [((start if (t := times[n]) is None else t) - start) / 3600 for n in ends]
    images = values.get("train/images")
    return Columns(
        steps=[records[n]["step"] for n in ends],
        hours=hours,
        images=[float(v or 0) for v in images] if images and all(v is not None for v in images) else None,
        values={k: v for k, v in values.items() if any(x is not None for x in v)},
        broken=broken,
        last=times[-1] if times else None,
    )


LARGEST = 10**300


def _number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, float) or abs(value) < LARGEST  # larger ones are no float


def _together(found: list[float], reduce: str) -> float:
    if reduce == "max":
        return max(found)
    return found[-1] if reduce == "last" else sum(found) if reduce == "sum" else sum(found) / len(found)


def _cut(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


# --- which curves share a chart --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Chart:
    """What one chart shows."""

    name: str
    """Of this chart among all of the page."""
    title: str
    keys: Mapping[str, str]
    """metric -> label of its curve"""
    wide: bool = False
    more: bool = False
    """Not of the first interest: behind "more curves"."""

    @property
    def unit(self) -> str:
        units = {about(key).unit for key in self.keys}
        return units.pop() if len(units) == 1 else ""


CHOSEN: Mapping[str, Sequence[tuple[str, Mapping[str, str]]]] = {
    "learning": (
        ("Loss", {"train/loss": "training", "eval/loss": "validation", "eval/loss_ema": "validation, EMA"}),
        ("Gradient norm", {"optim/grad_norm": "mean", "optim/grad_norm_max": "largest"}),
        ("Learning rate", {"optim/lr": "learning rate"}),
    ),
    "routing": (),
    "speed": (
        ("Throughput", {"perf/images_per_s": "images per second"}),
        ("Data stall", {"data/stall_frac": "waiting for data"}),
        ("Model FLOP utilisation", {"perf/mfu": "model FLOP utilisation"}),
        ("Device memory", {"mem/allocated_gib": "memory"}),
    ),
}
GROUPS = {
    "train": "learning",
    "optim": "learning",
    "diffusion": "learning",
    "eval": "learning",
} | {"moe": "routing"}
"""Group of a metric -> section; any other is under "speed"."""
TITLES = {
    "moe/L{n}/dropped_frac": "Tokens without an expert",
    "moe/L{n}/experts_per_token_std": "Spread of experts per token",
    "moe/L{n}/experts_per_token_max": "Largest number of experts of a token",
    "moe/L{n}/entropy": "Router entropy",
    "moe/L{n}/gate_mean": "Mean gate",
    "moe/L{n}/overflow_frac": "Choices beyond capacity",
    "moe/L{n}/capped_frac": "Rows beyond the cap",
    "moe/L{n}/load_cv": "Load imbalance",
    "moe/L{n}/max_violation": "Overload of the busiest expert",
    "moe/L{n}/combination_usage": "Pairs of experts in use",
    "diffusion/loss_t{b}": "Loss by timestep",
}
AUXILIARY = re.compile(r"train/(.+)_loss$")
_PLACES = ((re.compile(r"/L(\d+)/"), "/L{n}/", "layer "), (re.compile(r"_t(\d+)$"), "_t{b}", "bin "))


def charts(section: str, found: Columns) -> list[Chart]:
    """Charts of a section (a key of `CHOSEN`), the chosen ones first, then all else that was logged, as families: one curve a
    layer, one curve a timestep bin."""
    left = [k for k in found.values if _section(k) == section and k != "train/images"]
    made: list[Chart] = []
    for title, keys in CHOSEN[section]:
        here = {k: label for k, label in keys.items() if k in left}
        if here:
            made.append(Chart(name=_name(title), title=title, keys=here, wide=title == "Loss"))
            left = [k for k in left if k not in here]
    losses = {k: AUXILIARY.sub(r"\1", k) for k in left if AUXILIARY.match(k)}
    if losses:
        made.append(Chart(name="auxiliary-losses", title="Auxiliary losses", keys=losses))
    families: dict[str, dict[str, str]] = {}
    for key in left:
        if key not in losses:
            family, label = _family(key)
            families.setdefault(family, {})[key] = label
    for family, keys in families.items():
        if family.replace("/", "/L{n}/", 1) in families:
            continue  # the same over layers
        title = TITLES.get(family) or family.rpartition("/")[2].replace("_t{b}", " by timestep").replace("_", " ")
        made.append(Chart(name=_name(family), title=title, keys=_sorted(keys), more="{" not in family))
    order = {title: n for n, title in enumerate(TITLES.values())}
    if section == "routing":
        made.sort(key=lambda c: order.get(c.title, len(order)))
    return sorted(made, key=lambda c: c.more)


def questions(chart: Chart) -> list[tuple[str, Metric]]:
    """(metric, what it tells) of a chart, one for a family of curves."""
    said: dict[str, Metric] = {}
    for key in chart.keys:
        said.setdefault(_family(key.rpartition(":")[2])[0], about(key))
    return list(said.items())


def color(n: int, *, of: int) -> str:
    """The nth curve's: of a palette, or along a scale where there are more curves than it has colours."""
    return PALETTE[n % len(PALETTE)] if of <= len(PALETTE) else f"hsl({230 - round(230 * n / (of - 1))} 62% 48%)"


def _section(key: str) -> str:
    return GROUPS.get(key.partition("/")[0], "speed")


def _family(key: str) -> tuple[str, str]:
    """(`moe/L{n}/entropy`, "layer 2") of `moe/L2/entropy`."""
    for pattern, place, label in _PLACES:
        match = pattern.search(key)
        if match:
            return pattern.sub(place, key), label + match[1]
    return key, key.rpartition("/")[2].replace("_", " ")


def _sorted(keys: Mapping[str, str]) -> dict[str, str]:
    return dict(
        sorted(keys.items(), key=lambda item: [int(n) if n.isdigit() else n for n in re.split(r"(\d+)", item[0])])
    )


def _name(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")

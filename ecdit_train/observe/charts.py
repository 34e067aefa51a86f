"""Line charts as inline SVG: what a page shows before its scripts run, without them, and on paper. templates/charts.js draws the
same chart again from the same numbers, at the size of the window, and makes it answer to hands."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from .curves import Chart, Columns, about, color, questions
from .page import render, short

WIDTH, WIDE, HEIGHT = 640, 1320, 280
LEFT, RIGHT, TOP, BOTTOM = 62, 26, 12, 34
MAX_POINTS = 600
"""Points drawn per curve; longer ones are averaged in equal buckets."""
MAX_FAINT = 4
"""Curves of a chart up to which the raw values are drawn behind the smoothed ones."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    """None: a gap."""
    color: str
    faint: bool = False
    """Drawn thin behind the others and left out of the legend (raw values behind a smoothed curve)."""
    dashed: bool = False
    key: str = ""
    """The metric; scripts look it up."""


def weight_for(num: int) -> float:
    """Of a moving average over about a thirtieth of a curve of `num` points."""
    return min(0.98, max(0.0, 1 - 30 / max(1, num)))


def smooth(values: Sequence[float | None], *, weight: float | None = None) -> list[float | None]:
    """Exponential moving average without the bias of its start; None: over about a thirtieth of the curve. Gaps stay."""
    weight = weight_for(len(values)) if weight is None else weight
    mean, norm, out = 0.0, 0.0, list[float | None]()
    for value in values:
        if value is None:
            out.append(None)
            continue
        mean, norm = weight * mean + (1 - weight) * value, weight * norm + (1 - weight)
        out.append(mean / norm)
    return out


def is_smoothed(key: str) -> bool:
    """Means are noisy. A largest value, or a learning rate, is what it is."""
    return about(key).reduction == "mean"


def draw(chart: Chart, found: Columns) -> str:
    """A `<figure>` of some columns of a log; an empty string without a point."""
    curves = []
    for n, (key, label) in enumerate(chart.keys.items()):
        x, y = found.series(key)
        own = Curve(label=label, x=x, y=y, color=color(n, of=len(chart.keys)), key=key)
        if is_smoothed(key) and weight_for(len(x)) > 0:
            if len(chart.keys) <= MAX_FAINT:
                curves.append(replace(own, faint=True))
            own = replace(own, y=smooth(y))
        curves.append(own)
    told = questions(chart)
    return line_chart(curves, title=chart.title, unit=chart.unit, wide=chart.wide, name=chart.name, told=told)


def line_chart(
    curves: Sequence[Curve],
    *,
    title: str,
    unit: str = "",
    wide: bool = False,
    name: str = "",
    x_name: str = "step",
    told: Sequence[tuple[str, Any]] = (),
) -> str:
    """A `<figure>`; an empty string when no curve has a point. `wide` spans the page; with a `name` it is one that scripts know."""
    curves = [_thinned(c) for c in curves if any(y is not None for y in c.y)]
    if not curves:
        return ""
    xs, ys = [x for c in curves for x in c.x], [y for c in curves for y in c.y if y is not None]
    scheduled = all(c.key and about(c.key).reduction == "last" for c in curves)  # a learning rate that ends at 0
    log = min(ys) > 0 and max(ys) / min(ys) > 20 and not scheduled
    x_low, x_high = _padded(min(xs), max(xs), share=0.0)
    y_low, y_high = (math.log10(min(ys)), math.log10(max(ys))) if log else (min(ys), max(ys))
    y_low, y_high = _padded(y_low, y_high, share=0.06)
    right, bottom = (WIDE if wide else WIDTH) - RIGHT, HEIGHT - BOTTOM

    def px(x: float) -> float:
        return round(LEFT + (x - x_low) / (x_high - x_low) * (right - LEFT), 1)

    def py(y: float) -> float:
        value = math.log10(y) if log else y
        return round(bottom - (value - y_low) / (y_high - y_low) * (bottom - TOP), 1)

    faint_first = sorted(curves, key=lambda c: not c.faint)
    return render(
        "chart.html",
        name=name,
        x_name=x_name,
        told=told,
        title=title,
        unit="" if unit == "1" else unit,
        log=log,
        wide=wide,
        width=right + RIGHT,
        height=HEIGHT,
        left=LEFT,
        right=right,
        top=TOP,
        bottom=bottom,
        y_ticks=[(py(y), short(y)) for y in (_log_ticks(y_low, y_high) if log else _ticks(y_low, y_high))],
        x_ticks=[(px(x), short(x)) for x in _ticks(x_low, x_high, about=10 if wide else 5)],
        drawn=[(c, [(run, _words(run)) for run in _runs(c, px=px, py=py)]) for c in faint_first],
        data={
            "wide": wide,
            "log": log,
            "curves": [
                {"key": c.key, "label": c.label, "color": c.color, "smooth": is_smoothed(c.key)}
                for c in curves
                if not c.faint and c.key
            ],
        },
    )


def _runs(curve: Curve, *, px: Any, py: Any) -> list[list[tuple[float, float]]]:
    """Unbroken pieces of a curve, in the chart's units: their points."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(curve.x, curve.y, strict=True):
        if y is not None:
            pieces[-1].append((px(x), py(y)))
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]


def _words(points: Sequence[tuple[float, float]]) -> str:
    """As SVG has them."""
    return " ".join(f"{x},{y}" for x, y in points)


def _thinned(curve: Curve) -> Curve:
    n = len(curve.x)
    if n <= MAX_POINTS:
        return curve
    buckets = list(pairwise(n * i // MAX_POINTS for i in range(MAX_POINTS + 1)))
    known = [[y for y in curve.y[a:b] if y is not None] for a, b in buckets]
    return replace(curve, x=[curve.x[b - 1] for _, b in buckets], y=[sum(v) / len(v) if v else None for v in known])


def _padded(low: float, high: float, *, share: float) -> tuple[float, float]:
    if high == low:
        pad = abs(low) * 0.1 or 0.5
        return low - pad, high + pad
    return low - share * (high - low), high + share * (high - low)


def _ticks(low: float, high: float, *, about: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten."""
    raw = high / about - low / about  # a range may be more than the largest number
    if not 0 < raw < 1e300:
        return [low, high]
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * 0.999)
    return [round(i * step, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(low), math.ceil(high) + 1)
    factors = (1, 2, 5) if high - low < 2.5 else (1,)
    return [10.0**p * f for p in powers for f in factors if low <= math.log10(10.0**p * f) <= high]

"""Curves of the log, and line charts of them as inline SVG: sharp at any size, a few kilobytes each, with a
readout under the pointer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from .page import render, short

WIDTH, WIDE, HEIGHT = 640, 1320, 280
LEFT, RIGHT, TOP, BOTTOM = 62, 26, 12, 34
MAX_POINTS = 600
"""Points drawn per curve; longer ones are averaged in equal buckets."""
PALETTE = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#0891b2", "#65a30d", "#dc2626", "#475569", "#a16207")


@dataclass(frozen=True, kw_only=True)
class Curve:
    label: str
    x: Sequence[float]
    y: Sequence[float]
    color: str
    faint: bool = False
    """Drawn thin behind the others and left out of the legend (raw values behind a smoothed curve)."""


def smooth(values: Sequence[float], *, weight: float | None = None) -> list[float]:
    """Exponential moving average without the bias of its start; None: over about a thirtieth of the curve."""
    if weight is None:
        weight = min(0.98, max(0.0, 1 - 30 / max(1, len(values))))
    mean, norm, out = 0.0, 0.0, []
    for value in values:
        mean, norm = weight * mean + (1 - weight) * value, weight * norm + (1 - weight)
        out.append(mean / norm)
    return out


def series(records: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """(steps, values) of the records that have a number under `key`."""
    points = [(r["step"], r[key]) for r in records if isinstance(r.get(key), (int, float)) and "step" in r]
    points = [(s, v) for s, v in points if math.isfinite(v)]
    return [float(s) for s, _ in points], [float(v) for _, v in points]


def line_chart(curves: Sequence[Curve], *, title: str, unit: str = "", wide: bool = False) -> str:
    """A `<figure>`; an empty string when no curve has a point. x is the training step; `wide` spans the page."""
    curves = [_thinned(c) for c in curves if len(c.x)]
    if not curves:
        return ""
    xs, ys = [x for c in curves for x in c.x], [y for c in curves for y in c.y]
    log = min(ys) > 0 and max(ys) / min(ys) > 20
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
        title=title,
        subtitle=", ".join([unit] * (unit not in ("", "1")) + ["log scale"] * log),
        wide=wide,
        width=right + RIGHT,
        height=HEIGHT,
        left=LEFT,
        right=right,
        top=TOP,
        bottom=bottom,
        y_ticks=[(py(y), short(y)) for y in (_log_ticks(y_low, y_high) if log else _ticks(y_low, y_high))],
        x_ticks=[(px(x), short(x)) for x in _ticks(x_low, x_high, about=10 if wide else 5)],
        drawn=[(c, [(px(x), py(y)) for x, y in zip(c.x, c.y, strict=True)]) for c in faint_first],
        data={
            "width": right + RIGHT,
            "span": [px(x_low), px(x_high)],
            "x": [x_low, x_high],
            "curves": [{"x": list(c.x), "y": [float(f"{y:.5g}") for y in c.y]} for c in curves if not c.faint],
        },
    )


def _thinned(curve: Curve) -> Curve:
    n = len(curve.x)
    if n <= MAX_POINTS:
        return curve
    buckets = list(pairwise(n * i // MAX_POINTS for i in range(MAX_POINTS + 1)))
    return replace(curve, x=[curve.x[b - 1] for _, b in buckets], y=[sum(curve.y[a:b]) / (b - a) for a, b in buckets])


def _padded(low: float, high: float, *, share: float) -> tuple[float, float]:
    if high == low:
        pad = abs(low) * 0.1 or 0.5
        return low - pad, high + pad
    return low - share * (high - low), high + share * (high - low)


def _ticks(low: float, high: float, *, about: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * 0.999)
    return [round(i * step, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(low), math.ceil(high) + 1)
    factors = (1, 2, 5) if high - low < 2.5 else (1,)
    return [10.0**p * f for p in powers for f in factors if low <= math.log10(10.0**p * f) <= high]

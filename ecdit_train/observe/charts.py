"""Line charts as inline SVG: sharp at any size, a few kilobytes each, with a readout under the pointer. No library."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

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


def line_chart(curves: Sequence[Curve], *, title: str, unit: str = "", wide: bool = False) -> str:
    """A `<figure>`; an empty string when no curve has a point. x is the training step; `wide` spans the page."""
    width = WIDE if wide else WIDTH
    curves = [_thinned(c) for c in curves if len(c.x)]
    if not curves:
        return ""
    xs = [x for c in curves for x in c.x]
    ys = [y for c in curves for y in c.y]
    log = min(ys) > 0 and max(ys) / min(ys) > 20
    x_low, x_high = _padded(min(xs), max(xs), share=0.0)
    y_low, y_high = (math.log10(min(ys)), math.log10(max(ys))) if log else (min(ys), max(ys))
    y_low, y_high = _padded(y_low, y_high, share=0.06)

    def px(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (width - LEFT - RIGHT)

    def py(y: float) -> float:
        value = math.log10(y) if log else y
        return HEIGHT - BOTTOM - (value - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for tick in _log_ticks(y_low, y_high) if log else _ticks(y_low, y_high):
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{py(tick):.1f}" y2="{py(tick):.1f}"/>'
            f'<text x="{LEFT - 8}" y="{py(tick) + 4:.1f}" text-anchor="end">{number(tick)}</text>'
        )
    for tick in _ticks(x_low, x_high, about=10 if wide else 5):
        parts.append(f'<text x="{px(tick):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{number(tick)}</text>')
    parts.append(f'<text x="{LEFT - 8}" y="{HEIGHT - BOTTOM + 18}" text-anchor="end">step</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{width - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>')
    for curve in sorted(curves, key=lambda c: not c.faint):
        points = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in zip(curve.x, curve.y, strict=True))
        style = "opacity:.4;stroke-width:1" if curve.faint else "stroke-width:2"
        parts.append(f'<polyline points="{points}" stroke="{curve.color}" style="{style}"/>')
        if len(curve.x) == 1:
            parts += [
                f'<circle cx="{px(x):.1f}" cy="{py(y):.1f}" r="3" fill="{curve.color}"/>'
                for x, y in zip(curve.x, curve.y, strict=True)
            ]
    parts.append(f'<line class="cursor" x1="0" x2="0" y1="{TOP}" y2="{HEIGHT - BOTTOM}" visibility="hidden"/>')
    shown = [c for c in curves if not c.faint]
    legend = "".join(f'<span><i style="background:{c.color}"></i>{html.escape(c.label)}<b></b></span>' for c in shown)
    data = {
        "width": width,
        "span": [px(x_low), px(x_high)],
        "x": [x_low, x_high],
        "curves": [{"x": list(c.x), "y": [_rounded(y) for y in c.y]} for c in shown],
    }
    subtitle = ", ".join([unit] * (unit not in ("", "1")) + ["log scale"] * log)
    name, small = html.escape(title), html.escape(subtitle)
    return (
        f'<figure class="chart{" wide" * wide}"><figcaption><strong>{name}</strong> <small>{small}</small></figcaption>'
        f'<svg viewBox="0 0 {width} {HEIGHT}" role="img" aria-label="{name}">{"".join(parts)}</svg>'
        f'<div class="legend"><em></em>{legend}</div>'
        f'<script type="application/json">{json.dumps(data)}</script></figure>'
    )


def number(value: float) -> str:
    """Short and readable: 1,200  0.034  2.5e-05."""
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-3 or size >= 1e9:
        return f"{value:.3g}"
    if size >= 1e6:
        return f"{value / 1e6:.4g}M"
    if size >= 1e4 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def _thinned(curve: Curve) -> Curve:
    n = len(curve.x)
    if n <= MAX_POINTS:
        return curve
    edges = [n * i // MAX_POINTS for i in range(MAX_POINTS + 1)]
    buckets = list(pairwise(edges))
    return Curve(
        label=curve.label,
        color=curve.color,
        faint=curve.faint,
        x=[curve.x[b - 1] for _, b in buckets],
        y=[sum(curve.y[a:b]) / (b - a) for a, b in buckets],
    )


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

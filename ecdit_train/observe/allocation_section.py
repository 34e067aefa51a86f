"""Where compute goes, as a section of the report: what `ecdit allocation` measured, a chart a layer and all numbers below."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .charts import Curve, line_chart
from .page import render

KEYS = {"on_object": ("object", "#d97706"), "on_background": ("background", "#3b82f6")}


def html(made: Mapping[str, Any]) -> str:
    """`made`: what `evaluate.allocation.document` writes; an empty string where it is not of that form."""
    try:
        kinds: Mapping[str, Any] = made["kinds"]
        charts = [_chart(made, number) for number in range(len(made["layers"]))]
        return render(
            "allocation.html",
            about=f"Step {made['step']:,}, {made['weights']} weights, {made['experts']} experts, budget "
            f"{made['capacity_factor']:g}, routing scope {made['scope']}, {made['seeds']} seeds.",
            says=[
                (name, made.get("sources", {}).get(name, ""), kind["says"], kind["pictures"])
                for name, kind in kinds.items()
            ],
            charts=[chart for chart in charts if chart],
            tables=[(name, *_table(kind, made["layers"])) for name, kind in kinds.items()],
        )
    except (KeyError, TypeError, IndexError, ValueError):
        return ""


def _chart(made: Mapping[str, Any], number: int) -> str:
    curves = [
        Curve(
            label=f"{label}, {name}",
            x=kind["timesteps"],
            y=[row[number] for row in kind[key]["mean"]],
            color=color,
            dashed=n > 0,
        )
        for n, (name, kind) in enumerate(made["kinds"].items())
        for key, (label, color) in KEYS.items()
    ]
    return line_chart(curves, title=f"Layer {made['layers'][number]}", unit="experts per patch", x_name="t")


def _table(kind: Mapping[str, Any], layers: Sequence[int]) -> tuple[list[str], list[list[str]]]:
    """Header, and two lines for each layer, a cell for each timestep."""
    times = range(len(kind["timesteps"]))
    lines = [
        [f"layer {layer}, {label}", *(_said(kind[key], t, number) for t in times)]
        for number, layer in enumerate(layers)
        for key, (label, _) in KEYS.items()
    ]
    return ["experts per patch", *(f"t = {t:g}" for t in kind["timesteps"])], lines


def _said(table: Mapping[str, Any], t: int, number: int) -> str:
    mean, spread = (table[part][t][number] for part in ("mean", "spread"))
    return "-" if mean is None else f"{mean:.2f}" if spread is None else f"{mean:.2f} ± {spread:.2f}"

"""The figure of `ecdit allocation`: a panel for each sparse layer, experts per patch against the timestep."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .figures import INK, MUTED, new_figure, save

COLORS = {"on_object": "#c2410c", "on_background": "#2563eb"}
LABELS = {"on_object": "object", "on_background": "background"}
STYLES = ("-", "--", ":")
"""Of the kinds of pictures, in order."""
COLUMNS = 5


def write(made: Mapping[str, Any], path: Path) -> Path:
    """`made`: `evaluate.allocation.document`. Bands are one standard deviation over seeds."""
    layers = made["layers"]
    columns = min(COLUMNS, len(layers))
    rows = -(-len(layers) // columns)
    figure = new_figure(2.7 * columns + 1.2, 2.3 * rows + 0.7)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for number, layer in enumerate(layers):
        axes = grid[number // columns][number % columns]
        for (name, kind), style in zip(made["kinds"].items(), STYLES, strict=False):
            for key, color in COLORS.items():
                mean, spread = (_column(kind[key][part], number) for part in ("mean", "spread"))
                label = f"{LABELS[key]}, {name}" if number == 0 else None
                axes.plot(kind["timesteps"], mean, style, color=color, linewidth=1.6, label=label)
                axes.fill_between(kind["timesteps"], mean - spread, mean + spread, color=color, alpha=0.16, linewidth=0)
        axes.axhline(made["capacity_factor"], color=MUTED, linewidth=0.8, linestyle=(0, (1, 3)))
        axes.set_title(f"layer {layer}", fontsize=9, color=INK, loc="left")
        axes.grid(color="#e5e7eb", linewidth=0.6)
        axes.tick_params(labelsize=8, length=0, colors=MUTED)
        for side in ("top", "right", "left", "bottom"):
            axes.spines[side].set_visible(False)
    grid[0][0].set_ylim(bottom=0)  # shared; said before the last curve it would hold the top as well
    for axes in grid.flat[len(layers) :]:
        axes.set_visible(False)
    for axes in grid[-1]:
        axes.set_xlabel("t (0 noise, 1 data)", fontsize=8, color=MUTED)
    for axes_row in grid:
        axes_row[0].set_ylabel("experts per patch", fontsize=8, color=MUTED)
    figure.legend(loc="lower center", ncols=2 * len(made["kinds"]), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.3 / (2.3 * rows + 0.7), 1, 1))
    return save(figure, path)


def _column(table: Any, number: int) -> np.ndarray:
    """One layer over timesteps; a spread that is not known is none."""
    return np.array([np.nan if row[number] is None else row[number] for row in table], float)

"""The plot of a study: a panel for each number, a line for each arm, a dot for each seed and a bar at their mean."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from .figures import INK, MUTED, new_figure, save

Panel = tuple[str, Mapping[str, Sequence[float]]]
"""(title, arm -> a value for each seed; none where the arm has no such number)."""


def write(path: Path, panels: Sequence[Panel]) -> Path:
    """Arms are in the order of the first panel, from the top."""
    arms = list(panels[0][1])
    figure = new_figure(3.3 * len(panels) + 1.2, 0.34 * len(arms) + 1.1)
    axes_row = figure.subplots(1, len(panels), sharey=True)
    for axes, (title, values) in zip(axes_row, panels, strict=True):
        for place, arm in enumerate(arms):
            seeds = values[arm]
            if not seeds:
                continue
            axes.plot(seeds, [place] * len(seeds), "o", color="#2563eb", alpha=0.55, markersize=5, markeredgewidth=0)
            axes.plot([statistics.fmean(seeds)], [place], "|", color=INK, markersize=14, markeredgewidth=1.8)
        axes.set_title(title, fontsize=9, color=INK, loc="left")
        axes.grid(axis="x", color="#e5e7eb", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=8, length=0, colors=MUTED)
        for side in ("top", "right", "left", "bottom"):
            axes.spines[side].set_visible(False)
    axes_row[0].set_yticks(range(len(arms)), arms, fontsize=9, color=INK)
    axes_row[0].set_ylim(len(arms) - 0.5, -0.5)
    figure.tight_layout(w_pad=3.0)
    return save(figure, path)

"""Runs over each other: a page with every shared curve, and one picture of the telling ones."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ecdit_train import atomic

from .charts import draw, smooth, weight_for
from .curves import Chart, Columns, color, columns
from .diverging import MACHINES
from .figures import INK, MUTED, new_figure, save
from .journal import read_records
from .page import render

FIRST = (
    "train/loss",
    "eval/loss",
    "eval/loss_ema",
    "optim/grad_norm",
    "moe/entropy",
    "moe/dropped_frac",
    "moe/max_violation",
    "perf/images_per_s",
)
"""Metrics whose curves stand at the top; the others are behind "more curves"."""


def write_page(path: Path, *, runs: Sequence[tuple[str, str, Path]], told: Mapping[str, Any]) -> Path:
    """`runs`: (letter, label, folder). `told`: what the template says beside the curves."""
    found = {letter: columns(_without_layers(folder)) for letter, _, folder in runs}
    labels = {letter: f"{letter} {label}" for letter, label, _ in runs}
    together = _together(found)
    drawn = [(c.more, html) for c in _charts(found, labels) if (html := draw(c, together))]
    page = render(
        "compare.html",
        title=f"Comparison of {len(runs)} runs",
        written=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        charts=render("charts.html", name="curves", charts=drawn) if drawn else "",
        data={"curves": together.document()},
        **told,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(path, page.encode())
    return path


def write_picture(path: Path, *, runs: Sequence[tuple[str, str, Path]]) -> Path:
    """A PNG: one panel for each of the telling metrics that some run logs, up to four."""
    found = {letter: columns(read_records(folder), only=FIRST) for letter, _, folder in runs}
    shown = [key for key in FIRST if any(key in own.values for own in found.values())][:4]
    figure = new_figure(4.6 * max(1, len(shown)), 3.4)
    panels = figure.subplots(1, max(1, len(shown)), squeeze=False)[0]
    for axes, key in zip(panels, shown, strict=False):
        for n, (letter, label, _) in enumerate(runs):
            x, y = found[letter].series(key)
            drawn = [float("nan") if v is None else v for v in smooth(y, weight=weight_for(len(y)))]
            axes.plot(x, drawn, color=_hex(n, of=len(runs)), linewidth=1.4, label=f"{letter} {label}")
        axes.set_title(key, fontsize=9, color=INK, loc="left")
        axes.set_xlabel("step", fontsize=8, color=MUTED)
        axes.grid(color="#e5e7eb", linewidth=0.7)
        axes.tick_params(labelsize=8, length=0, colors=MUTED)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
    if shown:
        panels[0].legend(fontsize=7, frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    return save(figure, path)


def _hex(n: int, *, of: int) -> Any:
    """A colour as matplotlib takes it."""
    name = color(n, of=of)
    return name if name.startswith("#") else f"C{n % 10}"


def _without_layers(folder: Path) -> list[dict[str, Any]]:
    """A curve for each run and layer would be too many: single layers are in each run's own report."""
    return [{k: v for k, v in record.items() if "/L" not in k} for record in read_records(folder)]


def _charts(found: Mapping[str, Columns], labels: Mapping[str, str]) -> list[Chart]:
    logged = dict.fromkeys(key for own in found.values() for key in own.values)
    keys = [k for k in FIRST if k in logged] + sorted(k for k in logged if k not in FIRST and k != "train/images")
    return [
        Chart(
            name=key.replace("/", "-"),
            title=key,
            keys={f"{letter}:{key}": labels[letter] for letter, own in found.items() if key in own.values},
            wide=key == FIRST[0],
            more=key not in FIRST or key.startswith(MACHINES),
        )
        for key in keys
    ]


def _together(found: Mapping[str, Columns]) -> Columns:
    """The rows of all runs, one run after the other; `A:train/loss` is of the rows of run A only."""
    total = sum(len(own.steps) for own in found.values())
    values: dict[str, list[float | None]] = {}
    broken: dict[str, list[int]] = {}
    first = 0
    for letter, own in found.items():
        after = total - first - len(own.steps)
        for key, column in own.values.items():
            values[f"{letter}:{key}"] = [None] * first + column + [None] * after
            broken[f"{letter}:{key}"] = [first + row for row in own.broken.get(key, ())]
        first += len(own.steps)
    with_images = all(own.images is not None for own in found.values())
    return Columns(
        steps=[n for own in found.values() for n in own.steps],
        hours=[h for own in found.values() for h in own.hours],
        images=[n for own in found.values() for n in own.images or ()] if with_images else None,
        values=values,
        broken=broken,
        last=max((own.last for own in found.values() if own.last is not None), default=None),
    )

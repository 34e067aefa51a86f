"""Building blocks of the report: sections, pictures, slides, tables."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .charts import number


def section(title: str, note: str, body: str) -> str:
    """Nothing at all when there is no body."""
    return f'<section><h2>{title}</h2><p class="note">{note}</p>{body}</section>' if body else ""


def chart_section(title: str, note: str, charts: Sequence[str]) -> str:
    body = "".join(charts)
    return section(title, note, f'<div class="charts">{body}</div>' if body else "")


def png(path: Path, *, alt: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


def slide(label: str, body: str, *, caption: str = "") -> str:
    text = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f'<figure class="slide" data-label="{html.escape(label)}">{body}{text}</figure>'


def slides(figures: Sequence[str], *, name: str, start: int, play: bool = False) -> str:
    """A slider over figures; without scripts, or on paper, they stand one below the other."""
    button = '<button type="button">Play</button>' if play else ""
    bar = (
        f'<div class="slider" hidden>{button}<input type="range" min="0" max="{len(figures) - 1}" value="{start}" '
        f'aria-label="{html.escape(name)}"><output></output></div>'
    )
    return f'<div class="slides" data-start="{start}">{bar}{"".join(figures)}</div>'


def rows(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Cells are HTML already."""
    top = "".join(f"<th>{h}</th>" for h in header)
    body = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in line) + "</tr>" for line in lines)
    return f'<div class="scroll"><table><tr>{top}</tr>{body}</table></div>'


def table(values: Mapping[str, Any]) -> str:
    """Name and value; with a column per field where every value is a dict."""
    if values and all(isinstance(v, dict) for v in values.values()):
        columns = list(dict.fromkeys(c for v in values.values() for c in v))
        return rows(
            ["", *map(html.escape, columns)],
            [[html.escape(k), *(cell(v.get(c, "")) for c in columns)] for k, v in values.items()],
        )
    return rows(["", "value"], [[html.escape(k), cell(v)] for k, v in values.items()])


def cell(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return html.escape(json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else str(value))
    return f"<span>{number(value)}</span>"


def read_json(path: Path) -> Mapping[str, Any]:
    """A JSON object; empty when the file is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def evenly(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of them in order, first and last included."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]

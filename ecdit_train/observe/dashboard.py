"""What is shown of a project: `templates/dashboard.yaml`, read against the metrics that there are."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from .metrics import METRICS

DEFINITION = Path(__file__).with_name("templates") / "dashboard.yaml"
VERSION = 1

_PLACES = {"i": r"\d+", "n": r"\d+", "b": r"\d+"}
"""What stands for a part of a name; any other place is a word."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    title: str
    names: tuple[str, ...] = ()
    """Names that are logged as they stand."""
    regex: str | None = None
    """Instead, where a name has a place for a layer, a bin or a word."""
    images: tuple[str, ...] = ()
    log: bool = False
    stacked: bool = False


@dataclass(frozen=True, kw_only=True)
class Section:
    name: str
    opened: bool
    panels: tuple[Panel, ...]


@dataclass(frozen=True, kw_only=True)
class Dashboard:
    name: str
    report: str
    sections: tuple[Section, ...]


def read(path: Path = DEFINITION, *, known: Collection[str] = tuple(METRICS)) -> Dashboard:
    """Panels that show nothing of `known` are left out.

    Raises:
        ValueError: it is of another version.
    """
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    if tree.get("version") != VERSION:
        raise ValueError(f"{path} has version {tree.get('version')!r}; this ecdit reads version {VERSION}")
    sections = []
    for section in tree["sections"]:
        panels = tuple(made for panel in section["panels"] if (made := _panel(panel, known=known)) is not None)
        sections.append(Section(name=section["name"], opened=bool(section.get("open")), panels=panels))
    return Dashboard(name=tree["name"], report=tree["report"], sections=tuple(sections))


def patterns(path: Path = DEFINITION) -> list[str]:
    """Every pattern of metrics in the definition."""
    return [
        p
        for section in yaml.safe_load(path.read_text(encoding="utf-8"))["sections"]
        for panel in section["panels"]
        for p in panel.get("metrics", ())
    ]


def matches(pattern: str, known: Collection[str]) -> list[str]:
    """Keys of METRICS; in a pattern only `*` is special."""
    return [key for key in known if key == pattern or fnmatch.fnmatchcase(key, pattern)]


def _panel(panel: Mapping[str, Any], *, known: Collection[str]) -> Panel | None:
    if images := tuple(panel.get("images", ())):
        return Panel(title=panel["title"], images=images)
    if results := panel.get("results"):
        return Panel(title=panel["title"], regex=f"^{re.escape(results)}")
    keys = list(dict.fromkeys(key for pattern in panel["metrics"] for key in matches(pattern, known)))
    if not keys:
        return None
    how: dict[str, Any] = {"log": bool(panel.get("log")), "stacked": bool(panel.get("stacked"))}
    if any("{" in key for key in keys):
        return Panel(title=panel["title"], regex=f"^({'|'.join(map(_regex, keys))})$", **how)
    return Panel(title=panel["title"], names=tuple(keys), **how)


def _regex(key: str) -> str:
    return "".join(
        _PLACES.get(part[1:-1], r"[\w-]+") if part.startswith("{") else re.escape(part)
        for part in re.split(r"(\{\w+\})", key)
    )

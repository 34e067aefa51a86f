"""Templates of the report (templates/) and how values are written in them."""

from __future__ import annotations

import json
import math
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


def render(template: str, **values: Any) -> Markup:
    """A file of templates/ filled in; everything in `values` that is not markup already is escaped."""
    return Markup(_ENVIRONMENT.get_template(template).render(**values))


def short(value: float) -> str:
    """Short and readable: 1,200  0.034  2.5e-05."""
    if not math.isfinite(value):
        return "not finite"
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


def plain(value: Any) -> str:
    """Text as it is, a structure as JSON."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else str(value)


_ENVIRONMENT = Environment(
    loader=PackageLoader("ecdit_train.observe"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=StrictUndefined,
)
_ENVIRONMENT.filters |= {"short": short, "plain": plain}

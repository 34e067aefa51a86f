"""Templates of this room. Everything that is filled in is escaped: captions come from anywhere."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def render(template: str, **values: Any) -> str:
    """A file of templates/, filled in."""
    environment = Environment(
        loader=PackageLoader("data_pipeline.preparing"), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=StrictUndefined,
    )  # fmt: skip
    return environment.get_template(template).render(**values)

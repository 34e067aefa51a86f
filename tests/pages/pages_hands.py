"""What hands do in pages."""

from __future__ import annotations

from typing import Any


def set_range(page: Any, selector: str, value: int) -> None:
    page.eval_on_selector(
        selector,
        "(knob, value) => { knob.value = value; knob.dispatchEvent(new Event('input', {bubbles: true})); }",
        value,
    )

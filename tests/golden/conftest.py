"""`golden(file, section=..., text=...)` compares text with a stored section; `--update-golden` rewrites it.

A file holds sections under `== name ==` lines, each owned by one test, so several tests can share one file.
`make golden` is `pytest tests/golden --update-golden`; the review reads the diff.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", default=False, help="rewrite the golden files")


def read_sections(path: Path) -> dict[str, str]:
    """Section name -> text, in the file's order."""
    if not path.exists():
        return {}
    parts = re.split(r"^== (.+) ==\n", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], (text.rstrip("\n") + "\n" for text in parts[2::2]), strict=True))


def write_sections(path: Path, sections: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    blocks = [f"== {name} ==\n{text.rstrip()}\n" for name, text in sections.items()]
    path.write_text("\n".join(blocks), encoding="utf-8")


@pytest.fixture
def update(request: pytest.FixtureRequest) -> bool:
    """Whether files are rewritten instead of compared."""
    return bool(request.config.getoption("--update-golden", default=False))


@pytest.fixture
def stored() -> Callable[[str, str], str | None]:
    """(file, section) -> the text that is stored, or None."""
    return lambda file, section: read_sections(HERE / file).get(section)


@pytest.fixture
def golden(update: bool) -> Callable[..., None]:
    """Checks one section of a golden file, or rewrites it."""

    def check(file: str, *, section: str, text: str) -> None:
        path = HERE / file
        sections = read_sections(path)
        text = text.rstrip("\n") + "\n"
        if update:
            write_sections(path, {**sections, section: text})
            return
        assert sections.get(section) == text, f"{path} [{section}] is out of date: run `make golden`, read the diff"

    return check

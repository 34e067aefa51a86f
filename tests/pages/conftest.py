"""A real browser for pages: Chromium of the system, headless, without a network. Tests skip where there is none."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "observe"))

from observe_demo_run import build

from ecdit_train.observe.report import write_report

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
PICTURES = os.environ.get("ECDIT_PICTURES")
"""A folder for the screenshots that documents show: `make pictures`."""


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    program = next((path for name in PROGRAMS if (path := shutil.which(name))), None)
    if program is None:
        pytest.skip("no Chromium here (make browser-deps installs one, as root)")
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        running = playwright.chromium.launch(
            executable_path=program, args=["--no-sandbox"] if os.geteuid() == 0 else []
        )
        yield running
        running.close()


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A made-up run that all tests look at, and none changes."""
    return build(tmp_path_factory.mktemp("runs") / "demo", steps=1000)


@pytest.fixture(scope="session")
def url(run: Path) -> str:
    return write_report(run).as_uri()


@dataclass
class Opened:
    """A page, and what went wrong in it."""

    page: Any
    errors: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    """Requests beyond the file itself, or beyond the server that it came from; none of them is let through."""

    def fine(self) -> None:
        assert self.errors == []
        assert self.asked == []


@pytest.fixture
def look(browser: Any) -> Iterator[Callable[..., Opened]]:
    """Opens a URL in a window of its own. `phone`, `dark`: what kind of window."""
    contexts = []

    def open_page(url: str, *, phone: bool = False, dark: bool = False, **more: Any) -> Opened:
        context = browser.new_context(
            viewport={"width": 390, "height": 844} if phone else {"width": 1280, "height": 900},
            color_scheme="dark" if dark else "light",
            **({"has_touch": True, "is_mobile": True, "device_scale_factor": 2} if phone else {}),
            **more,
        )
        contexts.append(context)
        opened = Opened(page=context.new_page())
        opened.page.set_default_timeout(8000)
        opened.page.on("pageerror", lambda error: opened.errors.append(str(error)))
        opened.page.on("console", lambda m: opened.errors.append(m.text) if m.type in ("error", "warning") else None)
        home = urlsplit(url)

        def gate(route: Any) -> None:
            to = urlsplit(route.request.url)
            if to.scheme == "data" or (to.scheme, to.netloc, home.scheme == "http" or to.path) == (
                home.scheme,
                home.netloc,
                home.scheme == "http" or home.path,
            ):
                return route.continue_()
            opened.asked.append(route.request.url)
            return route.abort()

        context.route("**/*", gate)
        opened.page.goto(url)
        return opened

    yield open_page
    for context in contexts:
        context.close()


@pytest.fixture(scope="session")
def shot() -> Callable[..., None]:
    """Keeps a screenshot for the documents where they are asked for."""

    def keep(target: Any, name: str) -> None:
        if PICTURES:
            Path(PICTURES).mkdir(parents=True, exist_ok=True)
            target.screenshot(path=str(Path(PICTURES) / f"{name}.png"))

    return keep

"""The report while the run goes on: the same page, which asks every few seconds for the parts that have changed.

A part is made anew from its files, whole, so a run that goes back shows what is true afterwards. It is made at most once for each
change, whoever asks, and so seldom that making it takes a sixth of the time at most.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

from .loopback import Reply, Server
from .page import render
from .report import PARTS, Built, files_of, page, routing_part, shown
from .which_run import run_folder

SECONDS = 2.0
"""Between two questions of a page."""
LEISURE = 5.0
"""Times as long as it took to make a part, it is left alone."""

# Figures for paper take seconds: the file has them.
BUILDERS: Mapping[str, Callable[[Path], Built]] = {**PARTS, "routing": partial(routing_part, still=False)}


def server(folders: Sequence[str | Path], *, port: int = 0) -> Server:
    """Of one run, at /; of several, at /1/, /2/ ... with a list of them at /.

    Raises:
        RunFolderError: a folder is not a run.
        EcditError: the port cannot be had.
    """
    runs = [LiveRun(run_folder(name)) for name in folders]

    def answer(path: str, query: Mapping[str, str]) -> Reply | None:
        if len(runs) == 1:
            return runs[0].answer(path.removeprefix("/"), query)
        number, _, rest = path.removeprefix("/").partition("/")
        if path.count("/") == 1 and number in map(
            str, range(1, len(runs) + 1)
        ):  # so that what its page asks for lies below it
            return Reply(body=f'<meta http-equiv="refresh" content="0; url=/{number}/">')
        if not number:
            return Reply(body=render("runs.html", runs=[(n, run.run) for n, run in enumerate(runs, start=1)]))
        if not number.isdecimal() or not 1 <= int(number) <= len(runs) or not path.startswith(f"/{number}/"):
            return None
        return runs[int(number) - 1].answer(rest, query)

    return Server(answer, port=port)


@dataclass
class Kept:
    """A part as it was last made."""

    stamp: str = ""
    built: Built = field(default_factory=lambda: Built(sections={}))
    made_at: float = float("-inf")
    took: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)


class LiveRun:
    """The parts of a run's page, made anew when their files change. Any thread may ask."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self._kept = {name: Kept() for name in BUILDERS}

    def answer(self, path: str, query: Mapping[str, str]) -> Reply | None:
        if path == "":
            return Reply(body=self.page())
        return Reply.of(self.update(query)) if path == "update.json" else None

    def page(self) -> str:
        parts = {name: self._part(name) for name in BUILDERS}
        built = {name: kept.built for name, kept in parts.items()}
        stamps = {name: kept.stamp for name, kept in parts.items()}
        built["live"] = Built(sections={}, data={"live": {"stamps": stamps, "seconds": SECONDS, "now": time.time()}})
        return page(self.run, built, live=True)

    def update(self, seen: Mapping[str, str]) -> dict[str, Any]:
        """Parts whose stamp is not the one that the page has `seen`, and the time here."""
        parts = {name: self._part(name) for name in BUILDERS}
        return {
            "now": time.time(),
            "parts": {
                name: {"stamp": kept.stamp, "sections": dict(kept.built.sections), "data": dict(kept.built.data)}
                for name, kept in parts.items()
                if kept.stamp != seen.get(name)
            },
        }

    def _part(self, name: str) -> Kept:
        """As it is now; a copy, which stays what it is."""
        kept = self._kept[name]
        with kept.lock:
            stamp = _stamp(name, self.run)
            if stamp != kept.stamp and time.monotonic() - kept.made_at >= LEISURE * kept.took:
                start = time.monotonic()
                kept.built = shown(name, self.run, BUILDERS[name])
                # A file may have been replaced under our hands: the next question finds the new one.
                kept.stamp = f"{stamp} broken" if kept.built.broken else stamp
                kept.made_at = time.monotonic()
                kept.took = kept.made_at - start
            return Kept(stamp=kept.stamp, built=kept.built)


def _stamp(part: str, run: Path) -> str:
    """Of names, sizes and times of a part's files."""
    marks = []
    for path in sorted(files_of(part, run)):
        try:
            about = path.stat()
        except OSError:
            continue
        marks.append(f"{path.name} {about.st_size} {about.st_mtime_ns} {about.st_ino}")
    return blake2b("\n".join([part, *marks]).encode(), digest_size=8).hexdigest()

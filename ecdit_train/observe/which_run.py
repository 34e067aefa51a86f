"""Whether a folder is a run, and which one was meant where it is not."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path

from ecdit_train.errors import RunFolderError
from ecdit_train.run_folder import METRICS, METRICS_FILE, RESOLVED

SWEEP_FILE = "sweep.json"
HOLDS = f"a run folder holds {RESOLVED}, {METRICS_FILE} or {METRICS}/"
MAX_LOOKED_AT, MAX_DEPTH, MAX_NAMED = 400, 3, 4


def is_run(folder: Path) -> bool:
    return (folder / RESOLVED).is_file() or (folder / METRICS_FILE).is_file() or (folder / METRICS).is_dir()


def run_folder(name: str | Path) -> Path:
    """The folder, which is a run.

    Raises:
        RunFolderError: it is not; names the nearest runs below, above or beside it.
    """
    folder = Path(name)
    if is_run(folder):
        return folder
    what = "no such folder" if not folder.exists() else "not a folder" if not folder.is_dir() else "not a run"
    raise RunFolderError(f"{folder}: {what}; {HOLDS}. {hint(folder)}".rstrip())


def hint(folder: Path) -> str:
    """Which runs may have been meant."""
    if (folder / SWEEP_FILE).is_file():
        return f"This is a sweep: `ecdit compare {folder}`, or name one of its runs: {_listed(list(_below(folder)))}"
    below = list(_below(folder)) if folder.is_dir() else []
    if below:
        return f"Below it: {_listed(below)}"
    above = next((parent for parent in folder.parents if is_run(parent)), None)
    if above is not None:
        return f"Did you mean {above}?"
    beside = {p.name: p for p in _below(folder.parent)} if folder.parent.is_dir() else {}
    near = difflib.get_close_matches(folder.name, beside, n=MAX_NAMED, cutoff=0.5) or sorted(beside)
    return f"Near it: {_listed([beside[n] for n in near])}" if near else ""


def _listed(runs: list[Path]) -> str:
    more = f" and {len(runs) - MAX_NAMED} more" if len(runs) > MAX_NAMED else ""
    return ", ".join(map(str, runs[:MAX_NAMED])) + more


def _below(folder: Path) -> Iterator[Path]:
    """Runs up to `MAX_DEPTH` levels below, nearest first; looks at a bounded number of folders."""
    level, looked = [folder], 0
    for _ in range(MAX_DEPTH):
        inner: list[Path] = []
        for place in level:
            try:
                inner += sorted(p for p in place.iterdir() if p.is_dir() and not p.name.startswith("."))
            except OSError:
                continue
        looked += len(inner)
        inner = inner[:MAX_LOOKED_AT]
        yield from (p for p in inner if is_run(p))
        level = [p for p in inner if not is_run(p)]
        if looked > MAX_LOOKED_AT:
            return

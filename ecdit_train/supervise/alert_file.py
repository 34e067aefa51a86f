"""`<run>/alerts.jsonl`: what a run's own watch, or the supervisor of its job, found wrong. One JSON object a line, only added to.

    {"time": ..., "life": 3, "step": 1200, "name": "slow-data", "level": "warning", "state": "on", "words": "..."}

`state`: `on` when it begins, `off` when it is over. Standard library only: the login node writes here, too.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ecdit_train import atomic
from ecdit_train.run_folder import ALERTS


def append(run: Path, **facts: Any) -> None:
    """One line, in one write. A disk that refuses is no reason to end anything."""
    line = json.dumps({"time": round(time.time(), 3), **facts}, ensure_ascii=False) + "\n"
    with contextlib.suppress(OSError):
        handle = os.open(run / ALERTS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            # A line that a full disk or a cut of power tore must not swallow this one.
            torn = os.fstat(handle).st_size > 0 and (run / ALERTS).read_bytes()[-1:] != b"\n"
            os.write(handle, (("\n" if torn else "") + line).encode())
        finally:
            os.close(handle)


def read(run: Path) -> list[dict[str, Any]]:
    """In order; lines that are no JSON object are left out."""
    return [line for line in atomic.read_lines(run / ALERTS) if "name" in line]


def open_ones(run: Path, *, life: int | None = None) -> list[Mapping[str, Any]]:
    """Those that are on, oldest first. A new life looks anew: what an earlier one found does not count, but for what its job's
    supervisor wrote after it. `life`: the newest, where anybody knows; None: the newest that wrote a line."""
    lines = [line for line in read(run) if isinstance(line.get("life"), int | None)]
    newest = max((line["life"] for line in lines if line.get("life") is not None), default=None)
    newest = newest if life is None else max(life, newest or 0)
    on: dict[str, dict[str, Any]] = {}
    for line in lines:
        if line.get("life") not in (newest, None):
            continue
        if line.get("life") is not None:
            on = {name: old for name, old in on.items() if old.get("life") is not None}  # the job went on
        on.pop(str(line["name"]), None)
        if line.get("state") == "on":
            on[str(line["name"])] = line
    return list(on.values())

"""What the node launchers of one life tell the job's supervisor: small files in a folder that all nodes see.

jobs/4711/life-0003/exit             the exit code of the first process that failed, and why (ecdit_train.supervise.exit_file)
jobs/4711/life-0003/node-0001.json   host, and once its ranks have ended: their exit code and why
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ecdit_train.supervise import beats

VARIABLE = "ECDIT_LIFE"
"""The folder, for the node launchers."""
EXIT = "exit"


@dataclass(frozen=True, kw_only=True)
class Report:
    """One node's."""

    node: int
    host: str
    code: int | None
    """None while its ranks run."""
    why: str


def tell(node: int, *, code: int | None = None, why: str = "", environ: Mapping[str, str] = os.environ) -> None:
    """This node has begun, or its ranks have ended. Nothing where no supervisor asks; a disk that refuses ends nothing."""
    folder = environ.get(VARIABLE)
    if folder:
        host = host_here(environ)
        with contextlib.suppress(OSError):
            beats.write_json(Path(folder) / f"node-{node:04d}.json", {"host": host, "code": code, "why": why[:2000]})


def read(folder: Path) -> list[Report]:
    """Those that have come, by node."""
    found = []
    for path in sorted(folder.glob("node-*.json")):
        told = beats.read_json(path)
        if isinstance(told, dict) and "host" in told:
            node = int(path.stem.removeprefix("node-"))
            found.append(Report(node=node, host=told["host"], code=told.get("code"), why=told.get("why", "")))
    return found


def first_cause(folder: Path) -> tuple[int, str] | None:
    """What the first process that failed has left: (exit code, why)."""
    try:
        code, _, why = (folder / EXIT).read_text().strip().partition("\n")
        return int(code), why
    except (OSError, ValueError):
        return None


def host_here(environ: Mapping[str, str] = os.environ) -> str:
    """This machine's name in Slurm, or its own."""
    return environ.get("SLURMD_NODENAME") or socket.gethostname()

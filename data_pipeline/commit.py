"""Writing that either happened or did not: a temporary sibling, fsync, one rename."""

from __future__ import annotations

import os
import uuid
from pathlib import Path


def temporary_sibling(path: Path) -> Path:
    """A name beside `path` that no other writer has; `x.tar` -> `x.tar.part-<id>`."""
    return path.with_name(f"{path.name}.part-{uuid.uuid4().hex[:8]}")


def commit(part: Path, path: Path) -> None:
    """Make a finished temporary file durable under its final name. Two writers of equal content may race."""
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself lives in the folder
    finally:
        os.close(folder)


def write_committed(content: bytes, path: Path) -> None:
    """Write a small file in one go."""
    part = temporary_sibling(path)
    try:
        part.write_bytes(content)
        commit(part, path)
    finally:
        part.unlink(missing_ok=True)

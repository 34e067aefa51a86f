"""Writing a file that others read meanwhile: whole, by a temporary sibling, fsync and one rename, or line by line."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write(path: Path, data: bytes, *, mode: int = 0o644, make_folder: bool = True) -> None:
    """A reader sees the old file or the new one, never half of it, also after a crash of the machine.

    Args:
        mode: the file's permissions, whatever the umask.
        make_folder: False where a folder that is gone was moved or removed by somebody.

    Raises:
        OSError: it could not be written; the old file is as it was and nothing else is left behind.
    """
    if make_folder:
        path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            os.fchmod(handle, mode)
            file.flush()
            os.fsync(handle)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def append_line(path: Path, facts: Mapping[str, Any]) -> None:
    """Add a JSON object with the time and these facts, on disk when this returns. A disk that refuses is not a reason to end a
    run or a job: nothing is raised. The folder is made, but none above it: if that is gone, so is the record."""
    line = json.dumps({"time": round(time.time(), 3), **facts}, default=str) + "\n"
    with contextlib.suppress(OSError):
        path.parent.mkdir(exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, line.encode())
            os.fsync(handle)
        finally:
            os.close(handle)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of such a file, in order; what cannot be read is left out."""
    found = []
    with contextlib.suppress(OSError):
        for line in path.read_bytes().splitlines():
            with contextlib.suppress(ValueError):
                facts = json.loads(line)
                if isinstance(facts, dict):
                    found.append(facts)
    return found

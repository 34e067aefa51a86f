"""What one node is asked before a life: `python -m launch.preflight_task JSON`, one task a node. Prints one line of facts; what
is wrong with them the supervisor decides (`preflight`)."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.reports import host_here

MARK = "ecdit-preflight "
GPU_SECONDS = 30.0
FOLDER_SECONDS = 90.0
"""How long a name that the supervisor has renamed may take to be seen here: NFS keeps what it knows of a folder for up
to 60 s (acdirmax)."""


def main(argv: Sequence[str]) -> None:
    asked = json.loads(argv[0])
    facts: dict[str, Any] = {"host": host_here(), "missing": missing(asked["folders"])}
    facts |= gpus() if asked["gpu"] else {}
    facts["free"] = free(Path(asked["run"]))
    facts["sees"] = meets(Path(asked["meeting"]), token=asked["token"], host=facts["host"])
    facts["clock"] = time.time()  # last, and told at once
    sys.stdout.write(MARK + json.dumps(facts) + "\n")
    sys.stdout.flush()


def gpus(environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """How many GPUs this task sees, and what `nvidia-smi` says is wrong with them."""
    smi = shutil.which("nvidia-smi", path=environ.get("PATH"))
    if smi is None:
        return {"gpus": len([path for path in Path("/dev").glob("nvidia*") if path.name[6:].isdigit()])}
    query = [smi, "--query-gpu=index,ecc.errors.uncorrected.volatile.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=GPU_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"gpus": 0, "gpu_trouble": f"nvidia-smi: {error}"}
    if answer.returncode != 0:
        return {"gpus": 0, "gpu_trouble": "nvidia-smi: " + " ".join((answer.stdout + answer.stderr).split())[-300:]}
    rows = [[part.strip() for part in line.split(",")] for line in answer.stdout.splitlines() if line.strip()]
    sick = [f"GPU {row[0]} has {row[1]} uncorrected memory errors" for row in rows if row[1].isdigit() and int(row[1])]
    return {"gpus": len(rows)} | ({"gpu_trouble": "; ".join(sick)} if sick else {})


def missing(folders: Sequence[str]) -> list[str]:
    """What is not there or cannot be read; the first must be writable."""
    return [
        folder
        for number, folder in enumerate(folders)
        if not os.access(folder, os.R_OK | (os.X_OK | os.W_OK if number == 0 else 0))
    ]


def free(run: Path) -> int | None:
    """Bytes that we may still write."""
    try:
        found = os.statvfs(run)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize


def meets(meeting: Path, *, token: str, host: str) -> bool:
    """Leave our name by a rename, and see the supervisor's."""
    with contextlib.suppress(OSError):
        temporary = meeting / f".{host}.{os.getpid()}"
        temporary.write_text(token)
        os.replace(temporary, meeting / host)
    deadline = time.monotonic() + FOLDER_SECONDS
    while True:
        with contextlib.suppress(OSError):
            if (meeting / "supervisor").read_text() == token:
                return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.2)


if __name__ == "__main__":
    main(sys.argv[1:])

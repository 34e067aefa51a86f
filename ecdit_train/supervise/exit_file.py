"""Where a process leaves its exit code for the job: what Slurm or torchrun answer for many processes is not the first cause."""

from __future__ import annotations

import os
from collections.abc import Mapping

EXIT_FILE_VARIABLE = "ECDIT_EXIT_FILE"


def leave_exit_code(code: int, *, why: str = "", environ: Mapping[str, str] = os.environ) -> None:
    """Tells the job this process's exit code, and why on a second line; torchrun would turn it into 1, srun into 137 of one that
    was killed for it.

    The first failing process wins; outside a job (no variable) and for success this does nothing.
    """
    path = environ.get(EXIT_FILE_VARIABLE)
    if not path or code == 0:
        return
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except OSError:
        return  # someone was first, or the folder is gone: then srun's own answer counts
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(f"{code}\n" + (" ".join(why.split())[:2000] + "\n" if why else ""))

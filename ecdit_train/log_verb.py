"""What `ecdit logs` does: the end of what a run's jobs said, and what they go on saying. No torch."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ecdit_train import errors
from ecdit_train.errors import RunFolderError
from ecdit_train.run_folder import LOGS, RESOLVED

LOOK_SECONDS = 0.5
BLOCK = 1 << 16

LOGS_TEXT = """the end of the newest log of a run's jobs; all lives of a job write into one log

  ecdit logs runs/xl_8e
  ecdit logs runs/xl_8e --job 4711 --lines 500
  ecdit logs runs/xl_8e --follow"""


def declare(verb: Callable[..., argparse.ArgumentParser]) -> None:
    """The words of `logs`."""
    p = verb("logs", logs, LOGS_TEXT)
    p.add_argument("run", help="run folder")
    p.add_argument("--job", metavar="NUMBER", help="of this job instead of the newest")
    p.add_argument("--lines", type=int, default=40, metavar="N", help="so many lines (default 40)")
    p.add_argument("--follow", action="store_true", help="go on as it grows, until Ctrl-C")


def logs(args: argparse.Namespace) -> int:
    """Raises RunFolderError where there is no run or no log."""
    path = find(Path(args.run), job=args.job)
    print(f"{path}:", file=sys.stderr)
    with path.open("rb") as log:
        sys.stdout.buffer.write(tail(log, lines=max(args.lines, 0)))
        sys.stdout.flush()
        try:
            while args.follow:
                if more := log.read():
                    sys.stdout.buffer.write(more)
                    sys.stdout.flush()
                else:
                    time.sleep(LOOK_SECONDS)
        except KeyboardInterrupt:
            pass
    return errors.EXIT_OK


def find(run: Path, *, job: str | None = None) -> Path:
    """The log that was written last."""
    if not (run / RESOLVED).exists():
        raise RunFolderError(f"{run} is not a run folder: it has no {RESOLVED}")
    found = sorted((run / LOGS).glob("*.out" if job is None else f"*-{job}.out"), key=lambda path: path.stat().st_mtime)
    if not found:
        known = sorted(path.stem.rpartition("-")[2] for path in (run / LOGS).glob("*.out"))
        which = "job" if job is None else f"job {job}"
        hint = (
            f"; there are those of {', '.join(known)}"
            if known
            else "; a job writes its log when it starts: ecdit status"
        )
        raise RunFolderError(f"{run / LOGS} has no log of a {which}{hint}")
    return found[-1]


def tail(log, *, lines: int) -> bytes:  # type: ignore[no-untyped-def]
    """The last lines of an open binary file, which is at its end after it; reads no more of it than it must."""
    end = log.seek(0, os.SEEK_END)
    start, data = end, b""
    while start > 0 and data.count(b"\n") <= lines:
        start = max(0, start - BLOCK)
        log.seek(start)
        data = log.read(end - start)
    log.seek(end)
    return b"".join(data.splitlines(keepends=True)[-lines:]) if lines else b""

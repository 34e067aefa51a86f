"""Several ranks of one command on this machine, without Slurm or torchrun: what `ecdit --nproc N VERB ...` does.

Children are told their place by the same variables that torchrun sets. Signals are passed on; the first rank that fails decides
the exit code, which torchrun would turn into 1.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

GRACE_SECONDS = 15.0
"""How long the other ranks may take to leave after one has failed."""


def run_ranks(argv: Sequence[str], *, nproc: int) -> int:
    """Run `ecdit ARGV` as `nproc` ranks over loopback. Returns 0, or the exit code of the first rank that failed."""
    port = _free_port()
    threads = str(max(1, (os.cpu_count() or 1) // nproc))
    children = []
    for rank in range(nproc):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": nproc, "LOCAL_WORLD_SIZE": nproc, "MASTER_PORT": port}
        env = {"OMP_NUM_THREADS": threads, "MASTER_ADDR": "127.0.0.1"} | os.environ | {k: str(v) for k, v in place.items()}
        children.append(subprocess.Popen([sys.executable, "-m", "ecdit_train.cli", *argv], env=env, start_new_session=True))

    def forward(number: int, _frame: object) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    old = {s: signal.signal(s, forward) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)}
    try:
        return _wait(children)
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)
        for child in children:
            if child.poll() is None:
                child.kill()
            child.wait()


def _wait(children: Sequence[subprocess.Popen]) -> int:
    failed, deadline = 0, float("inf")
    while any(child.poll() is None for child in children):
        codes = [child.returncode for child in children if child.returncode]
        if codes and not failed:
            failed, deadline = codes[0], time.monotonic() + GRACE_SECONDS
        if time.monotonic() > deadline:
            return failed
        time.sleep(0.05)
    failed = failed or next((child.returncode for child in children if child.returncode), 0)
    return failed if failed >= 0 else 128 - failed


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])

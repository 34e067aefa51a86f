"""Several ranks of one command on this machine, without Slurm or torchrun: what `ecdit --nproc N VERB ...` does.

Children are told their place by the same variables that torchrun sets. Signals are passed on; the first rank that fails
decides the exit code, which torchrun would turn into 1. No rank outlives the launcher.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from ecdit_train.errors import PeerLostError

COMMAND = (sys.executable, "-m", "ecdit_train.cli")
"""The program of a rank."""

GRACE_SECONDS = 15.0
"""How long the other ranks may take to leave after one has failed."""


def run_ranks(argv: Sequence[str], *, nproc: int) -> int:
    """Run `ecdit ARGV` as `nproc` ranks over loopback. Returns 0, or the exit code of the rank that failed first."""
    port = free_port()
    threads = str(max(1, (os.cpu_count() or 1) // nproc))
    dies_with_us = _dies_with_parent()
    with _signals_passed_on() as (children, _):
        for rank in range(nproc):
            place = {
                "PYTHONSAFEPATH": 1,  # a launch.py or torch.py in the working directory is the user's, not ours
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": nproc,
                "LOCAL_WORLD_SIZE": nproc,
                "MASTER_PORT": port,
            }
            env = (
                {"OMP_NUM_THREADS": threads, "MASTER_ADDR": "127.0.0.1"}
                | os.environ
                | {k: str(v) for k, v in place.items()}
            )
            # A session of its own: Ctrl-C reaches a rank once, through `forward`.
            children.append(
                subprocess.Popen([*COMMAND, *argv], env=env, start_new_session=True, preexec_fn=dies_with_us)
            )
        return _wait(children)


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a command ended."""

    code: int
    stopped: bool
    """Whether this process was asked to stop meanwhile, and passed that on."""


def run_command(argv: Sequence[str]) -> Ended:
    """Run `ecdit ARGV` in a process of its own until it ends."""
    env = os.environ | {"PYTHONSAFEPATH": "1"}
    with _signals_passed_on() as (children, received):
        children.append(
            subprocess.Popen([*COMMAND, *argv], env=env, start_new_session=True, preexec_fn=_dies_with_parent())
        )
        code = children[0].wait()
        return Ended(code=code if code >= 0 else 128 - code, stopped=bool(received))


@contextmanager
def _signals_passed_on() -> Iterator[tuple[list[subprocess.Popen], list[int]]]:
    """A list for children, which get the signals that this process gets (noted in the second list) and do not outlive it."""
    children: list[subprocess.Popen] = []
    received: list[int] = []

    def forward(number: int, _frame: object) -> None:
        received.append(number)
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    old = {s: signal.signal(s, forward) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)}
    try:
        yield children, received
    finally:
        for child in children:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)  # and what it started
            child.wait()
        for s, handler in old.items():
            signal.signal(s, handler)


def _wait(children: Sequence[subprocess.Popen]) -> int:
    """Until all have left, or for GRACE_SECONDS after the first failure."""
    failed: dict[int, int] = {}  # in the order of time
    deadline = float("inf")
    while any(child.poll() is None for child in children) and time.monotonic() < deadline:
        _note(failed, children)
        if failed and deadline == float("inf"):
            deadline = time.monotonic() + GRACE_SECONDS
        time.sleep(0.05)
    _note(failed, children)
    if not failed:
        return 0
    # Ranks that only lost a peer may have left before the launcher saw why.
    causes = {rank: code for rank, code in failed.items() if code != PeerLostError.exit_code} or failed
    rank, code = next(iter(causes.items()))
    if code < 0:
        print(f"ecdit: rank {rank} was ended by {signal.Signals(-code).name}", file=sys.stderr)
    return code if code >= 0 else 128 - code


def _note(failed: dict[int, int], children: Sequence[subprocess.Popen]) -> None:
    for rank, child in enumerate(children):
        if child.poll() and rank not in failed:
            failed[rank] = child.returncode


def _dies_with_parent() -> Callable[[], None] | None:
    """To run in a child before its program: when the launcher is killed, the ranks are asked to stop (Linux only)."""
    if not sys.platform.startswith("linux"):
        return None
    prctl, launcher = ctypes.CDLL(None, use_errno=True).prctl, os.getpid()

    def ask() -> None:
        prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != launcher:
            os._exit(128 + signal.SIGTERM)

    return ask


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])

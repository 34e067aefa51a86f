"""The ranks of one command on this machine, without torchrun: what `ecdit --nproc G [--nodes N] VERB ...` does, on each of N nodes.

Children are told their place by the same variables that torchrun sets. Signals are passed on; the first rank that fails
decides the exit code, which torchrun would turn into 1. No rank outlives the launcher: it ends what does not leave, the
kernel asks the ranks to stop when it is killed, and the guard (`supervise.guard`) ends those that then stay. Launchers of
several nodes do not talk: ranks lose a node that fails in their next exchange, and the guards tell each other of a hang.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ecdit_train.errors import PeerLostError
from ecdit_train.supervise import beats, guard, summary
from ecdit_train.supervise.exit_file import leave_exit_code
from ecdit_train.supervise.stop import AT_ONCE, StopRequest
from ecdit_train.supervise.watched import VARIABLE, private, start_guard
from launch import interface, reports
from launch.place import Place

COMMAND = (sys.executable, "-m", "ecdit_train.cli")
"""The program of a rank."""

GRACE_SECONDS = 2.0
"""How long the other ranks may take to leave after one has failed; they lose it in their next exchange."""
CAUSE_SECONDS = 15.0
"""How long to wait for the rank that has failed when all that is known is that one lost a peer."""
STOP_SECONDS = 600.0
"""From a request to stop to the end, where the run does not say (`watch.grace`)."""
STOPPED = (0, 75)
"""Exit codes of ranks that left in good order."""


def run_ranks(argv: Sequence[str], *, nproc: int, place: Place | None = None) -> int:
    """Run `ecdit ARGV` as `nproc` ranks of this machine: all that there are, over loopback, or those of one node (`place`).

    Returns 0, or the exit code of the rank that failed first; that of the guard, if it ended them. A failure is also left
    where the job's supervisor looks for the first cause, since Slurm may kill this launcher for that of another node.
    """
    folder = private()
    if place is not None:
        reports.tell(place.node)
    try:
        end = _run(argv, nproc=nproc, place=place, folder=folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if place is not None:
        if end.code != PeerLostError.exit_code:
            leave_exit_code(end.code, why=end.why)
        reports.tell(place.node, code=end.code, why=end.why)
    return end.code


@dataclass(frozen=True, kw_only=True)
class End:
    """How the ranks of this machine ended."""

    code: int
    why: str
    """Empty where nobody has said."""


def _run(argv: Sequence[str], *, nproc: int, place: Place | None, folder: Path) -> End:
    common = _variables(nproc=nproc, place=place) | {VARIABLE: str(folder)}
    first = 0 if place is None else place.node * nproc
    prepare = _dies_with_parent(block=True)
    with _signals_passed_on() as (children, received):
        watchdog = start_guard(folder, ranks=nproc, launcher=True)
        assert watchdog.stdin is not None
        try:
            for local_rank in range(nproc):
                env = common | {"RANK": str(first + local_rank), "LOCAL_RANK": str(local_rank)}
                # A session of its own: Ctrl-C reaches a rank once, through `forward`.
                child = subprocess.Popen([*COMMAND, *argv], env=env, start_new_session=True, preexec_fn=prepare)
                children.append(child)
                if received:  # while this one was made: its list of children was shorter
                    child.send_signal(received[0])
                with contextlib.suppress(BrokenPipeError):
                    watchdog.stdin.write(f"{first + local_rank} {child.pid}\n".encode())
                    watchdog.stdin.flush()
            code = _wait(children, folder=folder, received=received, first=first)
            return End(code=code, why=_why(folder, code))  # now: the guard clears the folder when it is let go
        finally:
            with contextlib.suppress(BrokenPipeError):
                watchdog.stdin.close()
            try:
                watchdog.wait(timeout=5)
            except subprocess.TimeoutExpired:
                watchdog.kill()
                watchdog.wait()


def _variables(*, nproc: int, place: Place | None) -> dict[str, str]:
    """The environment that all ranks of this machine share."""
    threads = str(max(1, (os.cpu_count() or 1) // nproc))
    env = {"OMP_NUM_THREADS": threads, "MASTER_ADDR": "127.0.0.1"} | os.environ
    env |= {"PYTHONSAFEPATH": "1"}  # a launch.py or torch.py in the working directory is the user's, not ours
    env |= {"WORLD_SIZE": str(nproc), "LOCAL_WORLD_SIZE": str(nproc)}
    if place is None or place.nodes == 1:
        return env | {"MASTER_PORT": str(free_port())}
    name = interface.towards(place.address, port=place.port)
    chosen = {} if name is None else interface.variables(name)
    env = chosen | env | {"MASTER_ADDR": place.address, "MASTER_PORT": str(place.port)}
    return env | {"WORLD_SIZE": str(place.nodes * nproc)}


def _why(folder: Path, code: int) -> str:
    """What is known of an end with this code, in one line."""
    verdict = guard.read_verdict(folder)
    told = [verdict] if verdict else [found for p in folder.glob("failed-*") if (found := beats.read_json(p))]
    return next((str(found.get("why", "")) for found in told if found.get("exit_code") == code), "")


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
            subprocess.Popen(
                [*COMMAND, *argv], env=env, start_new_session=True, preexec_fn=_dies_with_parent(block=False)
            )
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


def _wait(children: Sequence[subprocess.Popen], *, folder: Path, received: Sequence[int], first: int) -> int:
    """Until all have left, or until those that do not leave must be ended: after a failure, or after a request to stop."""
    failed: dict[int, int] = {}  # in the order of time
    asked: list[tuple[float, int]] = []
    ends_at = float("inf")
    while any(child.poll() is None for child in children) and time.monotonic() < ends_at:
        _note(failed, children, folder=folder, first=first)
        now = time.monotonic()
        asked += [(now, number) for number in received[len(asked) :]]
        if failed:
            ends_at = min(ends_at, now + (GRACE_SECONDS if _causes(failed) else CAUSE_SECONDS))
        if asked:
            ends_at = min(ends_at, asked[0][0] + _grace(folder) + GRACE_SECONDS)
            if any(number in AT_ONCE and at - asked[0][0] > AT_ONCE[number] for at, number in asked):
                ends_at = min(ends_at, now + GRACE_SECONDS)
        time.sleep(0.05)
    _note(failed, children, folder=folder, first=first)
    if (found := guard.read_verdict(folder)) is not None:
        return int(found["exit_code"])
    if any(child.poll() is None for child in children) and not failed:
        print("ecdit: ranks that did not stop when they were asked to are ended", file=sys.stderr)
        return 128 + asked[0][1]
    # Ranks that only lost a peer may have left before the launcher saw why.
    code = next(iter(_causes(failed) or failed.values()), max(int(child.returncode or 0) for child in children))
    return code if code >= 0 else 128 - code


def _causes(failed: dict[int, int]) -> list[int]:
    return [code for code in failed.values() if code != PeerLostError.exit_code]


def _note(failed: dict[int, int], children: Sequence[subprocess.Popen], *, folder: Path, first: int) -> None:
    """Remember who failed. That a rank was ended by a signal is told at once, if it is the cause: it could not say so itself."""
    for rank, child in enumerate(children, start=first):
        code = child.poll()
        if code is None or code in STOPPED or rank in failed:
            continue
        if code < 0 and not _causes(failed) and guard.read_verdict(folder) is None:
            where = next((f" in {beat}" for beat in beats.read(folder) if beat.rank == rank), "")
            why = f"rank {rank} was ended by {signal.Signals(-code).name}{where}"
            print(f"ecdit: {why}", file=sys.stderr, flush=True)
            beats.tell_cause(folder, rank=rank, exit_code=128 - code, why=why)
        failed[rank] = code


def _grace(folder: Path) -> float:
    return float(summary.about(folder).get("grace", STOP_SECONDS))


def _dies_with_parent(*, block: bool) -> Callable[[], None] | None:
    """To run in a child before its program: when the launcher is killed, the ranks are asked to stop (Linux only). `block`: no
    signal arrives before the program can meet it (`StopRequest`, or the command itself, unblocks them)."""
    linux = sys.platform.startswith("linux")
    prctl, launcher = ctypes.CDLL(None, use_errno=True).prctl if linux else None, os.getpid()

    def ask() -> None:
        if block:
            signal.pthread_sigmask(signal.SIG_BLOCK, StopRequest.SIGNALS)
        if prctl is not None:
            prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
            if os.getppid() != launcher:
                os._exit(128 + signal.SIGTERM)

    return ask


def free_port() -> int:
    """A port of this machine that nobody listens at, from below those that the system gives to connections (Linux: 32768 up): so
    none of them takes it before rank 0 listens."""
    while True:
        port = random.SystemRandom().randrange(15000, 32000)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port

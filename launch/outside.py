"""All that the supervisor of a job asks of the world: time, words from the batch shell, other programs. One object, so that
tests can put another in its place."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WARNINGS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a program said. `code` is None where there is no such program, or it took too long."""

    code: int | None
    out: str
    err: str

    @property
    def words(self) -> str:
        """One line for a message."""
        return " ".join((self.err or self.out).split())[-500:]


class Outside:
    """See the module."""

    def __init__(self) -> None:
        self.warned: list[str] = []
        """Names of the signals that came, in order."""
        self._ears: int | None = None
        self._half = b""

    def open_ears(self, descriptor: int = 0) -> None:
        """From now on signals to this process, and lines on `descriptor` (names of signals, from the batch shell), are warnings."""
        for number in WARNINGS:
            signal.signal(number, lambda n, _: self.warned.append(signal.Signals(n).name.removeprefix("SIG")))
        self._ears = descriptor

    def now(self) -> float:
        """Seconds of a clock that cannot be set."""
        return time.monotonic()

    def listen(self, seconds: float) -> None:
        """Let time pass; warnings that come meanwhile are in `warned`."""
        deadline = self.now() + seconds
        while True:
            left = max(0.0, deadline - self.now())
            if self._ears is None:
                time.sleep(min(left, 0.5))
            elif select.select([self._ears], [], [], min(left, 0.5))[0]:
                self._hear()
            if self.now() >= deadline:
                return

    def _hear(self) -> None:
        assert self._ears is not None
        said = os.read(self._ears, 4096)
        if not said:  # the shell is gone: Slurm ends this process too
            self._ears = None
            return
        *lines, self._half = (self._half + said).split(b"\n")
        self.warned += [word for line in lines if (word := line.decode(errors="replace").strip())]

    def start(
        self, command: Sequence[str], *, environ: Mapping[str, str], stdout: int | None = None
    ) -> subprocess.Popen:
        """A program that runs beside us, and does not outlive us (Linux). It may ignore USR2: srun passes it on to its tasks all
        the same, and is not killed by one that comes before it listens. Raises OSError."""
        return subprocess.Popen(
            list(command),
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            preexec_fn=_child,
        )

    def call(
        self,
        command: Sequence[str],
        *,
        seconds: float = 60.0,
        environ: Mapping[str, str] | None = None,
        cwd: str | None = None,
    ) -> Answer:
        """A program's answer. It goes on when Slurm's SIGTERM comes to all processes of this job: half an order would be worse."""
        try:
            done = subprocess.run(
                list(command),
                env=None if environ is None else dict(environ),
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=seconds,
                check=False,
                preexec_fn=_deaf,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return Answer(code=None, out="", err=str(error))
        return Answer(code=done.returncode, out=done.stdout, err=done.stderr)


def _deaf() -> None:
    for number in WARNINGS:
        signal.signal(number, signal.SIG_IGN)


PRCTL = ctypes.CDLL(None).prctl if sys.platform.startswith("linux") else None


def _child() -> None:
    """srun answers SIGTERM by ending its step."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    if PRCTL is not None:
        PRCTL(1, signal.SIGTERM)  # PR_SET_PDEATHSIG

"""What each rank is doing, in a small memory-mapped file of its own that another process reads even while the rank holds the
interpreter's lock, blocks in C or is stopped.

A beat is written when a phase begins, never by a clock: it says which, since when (the machine's monotonic clock, the same
for all its processes), how long it may take, and how many phases came before, which is the same number on all ranks at the
same place of the program.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import struct
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ecdit_train.supervise import processes

PHASES = (
    *("start", "data", "encode", "forward", "backward", "exchange", "optimizer", "log"),
    *("save", "show", "validate", "close", "idle", "left"),
)
"""`exchange`: the gradients' norm, the step's numbers over all ranks, and what to do with them. `idle`: without a bound.
`left`: the rank has said what it had to say."""

BOUNDS = {
    "start": "start",
    "data": "data",
    "save": "save",
    "close": "save",
    "show": "show",
    "validate": "show",
    **dict.fromkeys(("encode", "forward", "backward", "exchange", "optimizer", "log"), "step"),
}
"""The key of `watch` that bounds a phase; a phase that is not named has none."""

ALONE = ("data", "encode", "forward", "backward", "optimizer")
"""Phases whose length is a rank's own doing, for the comparison of ranks."""

_MAGIC = b"ecdit-b1"
_HEAD = struct.Struct("=8sQQqqQQdqq")  # magic, version, pid, started, rank, counter, began, allowed, step, phase
_SPENT = struct.Struct(f"={len(PHASES)}d")
_SIZE = _HEAD.size + _SPENT.size
START_SECONDS = 1800.0
"""Bound of the start until the configuration says another."""


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What one rank was doing when the file was read."""

    rank: int
    pid: int
    started: int
    phase: str
    step: int
    """Of the phase: updates done before it, plus one."""
    counter: int
    """Phases begun in this life."""
    seconds: float
    """In this phase."""
    allowed: float
    """Seconds that the phase may take; inf: as long as it likes."""
    spent: Mapping[str, float]
    """Usual seconds of each phase in a step, recent steps counting most; 0 where it never ended."""

    def __str__(self) -> str:
        step = f" of step {self.step}" if self.step > 0 and self.phase not in ("start", "close", "left") else ""
        return f"{self.phase}{step}"


Enter = Callable[[str], None]
"""What code that has phases calls with the name of the phase that begins."""


def untold(phase: str) -> None:
    """An `Enter` for code that nobody watches."""


class Heart:
    """Writes one rank's beats. Without a folder it only remembers the phase."""

    def __init__(self, folder: Path | None, *, rank: int) -> None:
        self.folder, self.rank = folder, rank
        self.step = 0
        self.born = time.monotonic()
        self.also: Enter = untold
        """Told each phase too, as it begins."""
        self._watch: Mapping[str, float] = {"start": START_SECONDS}
        self._first: int | None = None
        """The first step of this life."""
        self._version = self._counter = self._phase = 0
        self._began = time.monotonic_ns()
        self._spent = [0.0] * len(PHASES)
        self._started = processes.started(os.getpid()) or 0
        self._map = None if folder is None else _map(folder, rank)
        self.enter("start")

    @property
    def phase(self) -> str:
        return PHASES[self._phase]

    def bound_by(self, watch: Mapping[str, float]) -> None:
        """Take the bounds of the configuration, from this phase on; it began when it began."""
        self._watch = watch
        self._write()

    def enter(self, phase: str, *, step: int | None = None) -> None:
        """A phase begins, and the one before has ended."""
        now, number = time.monotonic_ns(), PHASES.index(phase)
        spent = (now - self._began) / 1e9
        known = self._spent[self._phase]
        self._spent[self._phase] = spent if known == 0.0 else 0.8 * known + 0.2 * spent
        if step is not None:
            self._first = step if self._first is None else self._first
            self.step = step
        self._phase, self._began = number, now
        self._counter += 1
        self._write()
        self.also(phase)

    def failed(self, error: BaseException) -> None:
        """This rank ends with an error that it will tell: ranks that lose it for that need not say anything."""
        if self.folder is not None:
            code = int(getattr(error, "exit_code", 1))
            tell_cause(
                self.folder, rank=self.rank, exit_code=code, why=f"rank {self.rank}: {type(error).__name__}: {error}"
            )

    def cause(self, *, within: float) -> Mapping[str, Any] | None:
        """Why another rank of this machine has left or will be ended (exit_code, why); looks for `within` seconds.
        None: nobody here knows."""
        deadline = time.monotonic() + within
        while self.folder is not None:
            for path in (*sorted(self.folder.glob("failed-*")), self.folder / VERDICT):
                if path.name != failed_name(self.rank) and (found := read_json(path)) is not None:
                    return found
            if time.monotonic() >= deadline:
                return None
            time.sleep(0.02)
        return None

    def about(self, facts: Mapping[str, object]) -> None:
        """Tell the guard what it should know of the run (`guard.About`)."""
        if self.folder is not None:
            with contextlib.suppress(OSError):
                write_json(self.folder / ABOUT, facts)

    def _allowed(self) -> float:
        key = BOUNDS.get(PHASES[self._phase])
        if key is None:
            return float("inf")
        bound = self._watch.get(key, float("inf"))
        first = key == "step" and self._first == self.step
        return max(bound, self._watch.get("first_step", bound)) if first else bound

    def _write(self) -> None:
        if self._map is None:
            return
        self._version += 2  # odd while it is being written
        place = (os.getpid(), self._started, self.rank, self._counter, self._began, self._allowed(), self.step)
        _HEAD.pack_into(self._map, 0, _MAGIC, self._version - 1, *place, self._phase)
        _SPENT.pack_into(self._map, _HEAD.size, *self._spent)
        struct.pack_into("=Q", self._map, 8, self._version)


ABOUT, VERDICT = "about.json", "verdict.json"


def failed_name(rank: int) -> str:
    return f"failed-{rank:04d}"


def tell_cause(folder: Path, *, rank: int, exit_code: int, why: str) -> None:
    """Leave the reason of a rank's end where the others of its machine look; the first one stays."""
    path = folder / failed_name(rank)
    with contextlib.suppress(OSError):
        if not path.exists():
            write_json(path, {"exit_code": exit_code, "why": why[:4000]})


def read_json(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found


def write_json(path: Path, value: object) -> None:
    """By one rename, in a folder of this machine: nothing is synced. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value))
    os.replace(temporary, path)


def read(folder: Path) -> list[Beat]:
    """The beats of all ranks of this machine, by rank; a file that is not whole (yet) is left out."""
    found = []
    for path in sorted(folder.glob("rank-*")):
        with contextlib.suppress(OSError):
            if (beat := _read(path)) is not None:
                found.append(beat)
    return found


def _read(path: Path) -> Beat | None:
    for _ in range(100):
        data = path.read_bytes()
        if len(data) != _SIZE:
            return None
        magic, version, pid, started, rank, counter, began, allowed, step, phase = _HEAD.unpack_from(data)
        if magic != _MAGIC:
            return None
        if version % 2 == 0 and path.read_bytes()[8:16] == data[8:16]:
            spent = dict(zip(PHASES, _SPENT.unpack_from(data, _HEAD.size), strict=True))
            seconds = (time.monotonic_ns() - began) / 1e9
            return Beat(
                rank=rank, pid=pid, started=started, phase=PHASES[phase], step=step, counter=counter,
                seconds=seconds, allowed=allowed, spent=spent,
            )  # fmt: skip
    return None


def _map(folder: Path, rank: int) -> mmap.mmap:
    """This rank's file, new: a file of that name from another life is replaced, not written into."""
    path = folder / f"rank-{rank:04d}"
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=".rank-")
    try:
        os.ftruncate(handle, _SIZE)
        mapped = mmap.mmap(handle, _SIZE)
    finally:
        os.close(handle)
    os.replace(temporary, path)
    return mapped


def local_root() -> Path:
    """Where small files of this machine lie: in memory where there is such a place."""
    shared = Path("/dev/shm")
    return shared if os.access(shared, os.W_OK) else Path(tempfile.gettempdir())

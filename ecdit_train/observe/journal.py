"""The records of a run on its own disk: the truth, of which every sink has a copy.

    metrics/0003.jsonl    what the third life logged. Its first line says the step that it goes on from; a later such line, that
                          the run went back. Lines are only ever added, and only by that life.
    metrics.jsonl         what people tail: each step once, as the newest life has it. Made from the files above at the start of a
                          life, by one rename, and added to from then on.

So a life that has lost the folder without knowing it can add to its own file, which nobody else writes, or to a
`metrics.jsonl` that has been replaced; it cannot destroy a record. And what a resume or a roll-back cuts off stays on disk.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ecdit_train import atomic
from ecdit_train.errors import RunOwnedError, StorageError
from ecdit_train.run_folder import METRICS, metrics_path

from .metric_table import current_names

Value = float | int | str | None
Record = Mapping[str, Value]

RETRY_SECONDS = 5.0
MAX_PENDING = 100_000
"""Lines kept in memory while the disk refuses them; then the oldest go."""

logger = logging.getLogger("ecdit.observe")


def read_records(run: Path) -> list[dict[str, Any]]:
    """Each logged step once, from the newest life that made it, in order of steps. No records where there is no log."""
    files = _lives(run)
    if not files:
        return read_jsonl(metrics_path(run))
    kept: list[dict[str, Any]] = []
    for _, path in files:
        for record in read_jsonl(path):
            if "after" in record and "life" in record:
                kept = [old for old in kept if old.get("step", 0) <= record["after"]]
            else:
                kept.append(record)
    return kept


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Records in file order, with today's names; a cut last line (the writer was killed) is left out, a missing
    file is no records."""
    if not path.exists():
        return []
    records = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("not an object")
        except ValueError:
            if number < len(lines):
                logger.warning("%s line %d is not a JSON object, left out", path, number)
            continue
        records.append(current_names(record))
    return records


class Journal:
    """Appends `{"step": ..., "time": ..., key: value}`, one object per line, on disk after every call if the disk allows it.

    `time` is seconds since the epoch. Non-finite values are written as null, so that every line is JSON. A disk that is full,
    read-only or gone ends nothing: lines wait in memory, and are written when it is possible again.
    """

    def __init__(
        self, run: Path, *, life: int = 1, after: int = 0, still_ours: Callable[[], None] = lambda: None
    ) -> None:
        """`after`: the step that this life goes on from; records of later ones, which will be trained again, do not count any
        more. `still_ours` raises if the folder is not this life's to write in."""
        self._run, self._still_ours = run, still_ours
        # A folder that was copied without its lease counts from 1 again; a life's file is never another's.
        self.life = max([life, *(number + 1 for number, _ in _lives(run))])
        self._truth: Appended | None = None
        self._shown: Appended | None = None
        self._after = after
        self._ask_at = float("-inf")
        self._unasked = False
        """The disk could not say lately whose the folder is."""
        self._stale = True
        """`metrics.jsonl` is to be made anew, from the lives' files."""
        self._show_at = float("-inf")
        self._told_stale = False

    def log(self, step: int, record: Record) -> None:
        """The first call of a life cuts off what it goes on from; a life without records leaves no trace."""
        if self._truth is None:
            self.go_back(self._after)
        self._add({"step": step, "time": round(time.time(), 3)} | {k: _finite(v) for k, v in record.items()})

    def go_back(self, step: int) -> None:
        """Records of later steps do not count from now on; they stay in their life's file."""
        ours = self._known_ours()
        if self._truth is None:
            self._open()
            self._truth = Appended(_path(self._run, self.life), ours=True)
        self._truth.add(_line({"life": self.life, "after": step, "time": round(time.time(), 3)}), wait=not ours)
        self._stale = True
        self._show_at = float("-inf")
        if ours:
            self._show()

    def _show(self) -> None:
        """Make `metrics.jsonl` anew, once all that it is made from is on the disk; what the disk refuses is tried again."""
        assert self._truth is not None
        if self._truth.waits or time.monotonic() < self._show_at:
            return
        path = metrics_path(self._run)
        try:
            atomic.write(path, "".join(map(_line, read_records(self._run))).encode(), make_folder=False)
        except OSError as error:
            self._show_at = time.monotonic() + RETRY_SECONDS
            if not self._told_stale:
                self._told_stale = True
                logger.warning("%s is not up to date, training goes on: %s", path, error)
            return
        self._stale = self._told_stale = False
        if self._shown is not None:
            self._shown.drop()
        self._shown = Appended(path, ours=False)

    def _open(self) -> None:
        """The folder of the lives; a log from before there were lives becomes that of life 0."""
        try:
            (self._run / METRICS).mkdir(exist_ok=True)
            if not _lives(self._run) and metrics_path(self._run).exists():
                shutil.copyfile(metrics_path(self._run), _path(self._run, 0))
        except OSError as error:
            logger.warning("%s cannot be written, training goes on: %s", self._run / METRICS, error)

    def ours(self) -> bool:
        """Whether the folder is known to be this life's to write in. Raises nothing."""
        try:
            return self._known_ours()
        except RunOwnedError:
            return False

    def _known_ours(self) -> bool:
        """Raises RunOwnedError. False where a disk that fails cannot say; the next checkpoint, which must know, asks again."""
        if time.monotonic() < self._ask_at:
            return False
        try:
            self._still_ours()
        except (StorageError, OSError) as error:
            self._ask_at = time.monotonic() + RETRY_SECONDS
            if not self._unasked:
                self._unasked = True
                logger.warning("%s; lines wait in memory, training goes on", error)
            return False
        if self._unasked:
            self._unasked = False
            logger.warning("%s can be asked again whose it is; nothing is missing", self._run)
        return True

    def images(self, path: Path, key: str, step: int, caption: str) -> None:
        """Pictures are files of the run folder already."""

    def close(self) -> None:
        """Raises nothing: what cannot be written now is lost, and said so."""
        if self._truth is not None:
            self._truth.close()
            with contextlib.suppress(RunOwnedError):
                if self._stale and self._known_ours():
                    self._show_at = float("-inf")
                    self._show()
        if self._shown is not None:
            self._shown.close()

    def _add(self, record: Mapping[str, Value]) -> None:
        ours = self._known_ours()
        assert self._truth is not None
        self._truth.add(_line(record), wait=not ours)
        if self._stale:
            if ours:
                self._show()  # this line too
        elif self._shown is not None:
            self._shown.add(_line(record), wait=not ours)


class Appended:
    """A text file that only grows. A line that the disk does not take waits in memory."""

    def __init__(self, path: Path, *, ours: bool) -> None:
        """`ours`: nobody else writes it, so it is made again if it is gone. Otherwise another may have put a new one in
        its place, in which we have no business."""
        self.path, self._ours = path, ours
        self._pending: deque[bytes] = deque(maxlen=MAX_PENDING)
        self._handle, self._size = -1, 0
        self._retry_at = float("-inf")
        self._refused = False
        self._torn = False
        """The file may end in a part of a line of ours."""
        self._flush()

    @property
    def waits(self) -> bool:
        """Whether there are lines that the disk has not taken."""
        return bool(self._pending)

    def add(self, line: str, *, wait: bool = False) -> None:
        self._pending.append(line.encode())
        if not wait and time.monotonic() >= self._retry_at:
            self._flush()

    def close(self) -> None:
        """Raises nothing."""
        self._flush()
        if self._pending:
            logger.warning("%s: %d lines could not be written and are lost", self.path, len(self._pending))
        self.drop()

    def drop(self) -> None:
        """Close it without what waits; a file system may say only now that it has lost something (NFS, quota)."""
        handle, self._handle = self._handle, -1
        if handle >= 0:
            try:
                os.close(handle)
            except OSError as error:
                logger.warning("%s: what was written last may be missing: %s", self.path, error)

    def _flush(self) -> None:
        try:
            self._open()
            while self._pending:
                self._write(self._pending[0])
                self._pending.popleft()
        except OSError as error:
            self._retry_at = time.monotonic() + RETRY_SECONDS
            if not self._refused:
                self._refused = True
                logger.warning("%s cannot be written (%s); lines wait in memory, training goes on", self.path, error)
            return
        if self._refused:
            self._refused = False
            logger.warning("%s can be written again; nothing is missing", self.path)

    def _open(self) -> None:
        """The file, made if it is not there; its folder is not: one that is gone was moved or removed by somebody."""
        if self._handle >= 0 and self._ours and os.fstat(self._handle).st_nlink == 0:
            self.drop()
        if self._handle < 0:
            self._handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            self._size, self._torn = os.fstat(self._handle).st_size, False

    def _write(self, line: bytes) -> None:
        if self._torn:
            os.ftruncate(self._handle, self._size)
        self._torn, rest = True, line
        try:
            while rest:  # a disk may take a part, as a full one does before it refuses
                rest = rest[os.write(self._handle, rest) :]
        except OSError:
            with contextlib.suppress(OSError):  # else before the next line
                os.ftruncate(self._handle, self._size)
                self._torn = False
            raise
        self._torn = False
        self._size += len(line)


def _lives(run: Path) -> list[tuple[int, Path]]:
    files = (run / METRICS).glob("*.jsonl")
    return sorted((int(path.stem), path) for path in files if path.stem.isdigit())


def _path(run: Path, life: int) -> Path:
    return run / METRICS / f"{life:04d}.jsonl"


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Value) -> Value:
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""What was substituted, written down: one line for each delivered substitution, in an append-only file."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

MAX_UNWRITTEN = 10_000
"""Lines that wait in memory while the disk refuses them."""

logger = logging.getLogger("ecdit.data")


@dataclass(frozen=True, kw_only=True)
class BadSample:
    """One substitution."""

    position: int
    shard: str
    sample: int
    attempt: int
    error: str
    message: str


class Quarantine:
    """The file of one rank; `path` None keeps nothing."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._unwritten: list[str] = []
        self._handle = -1

    def add(self, bad: Sequence[BadSample]) -> None:
        """A disk that refuses ends nothing: the lines are tried again with the next ones."""
        if self.path is None or not bad:
            return
        self._unwritten += [json.dumps(asdict(sample)) + "\n" for sample in bad]
        try:
            # Held open: a folder that is renamed keeps its file, and nothing is made under the old name.
            if self._handle < 0:
                self._handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            size, lines = os.fstat(self._handle).st_size, "".join(self._unwritten).encode()
            if os.write(self._handle, lines) != len(lines):
                os.ftruncate(self._handle, size)
                raise OSError("the disk took only a part of the lines")
            self._unwritten.clear()
        except OSError as error:
            logger.warning("%s cannot be written (%s); its lines wait in memory", self.path, error)
            del self._unwritten[:-MAX_UNWRITTEN]

    def close(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

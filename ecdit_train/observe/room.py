"""How much room a run's disk has left, in checkpoints. Looked at once a minute: a file system has better to do."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from ecdit_train.run_folder import CHECKPOINTS, by_step

SECONDS = 60.0


class Room:
    def __init__(self, run: Path) -> None:
        self._run, self._size, self._newest = run, 0, -1
        self._look_at = float("-inf")

    def saves(self) -> float | None:
        """Checkpoints as large as the newest one that the disk still holds; None between two looks, before there is
        one, and where nobody can say."""
        if time.monotonic() < self._look_at:
            return None
        self._look_at = time.monotonic() + SECONDS
        try:
            if not (found := by_step(self._run / CHECKPOINTS, suffix="")):
                return None
            step, path = found[-1]
            if step != self._newest:
                self._newest, self._size = step, sum(file.stat().st_size for file in path.iterdir())
            return shutil.disk_usage(self._run).free / self._size if self._size else None
        except OSError:
            return None

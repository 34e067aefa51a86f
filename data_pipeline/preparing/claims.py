"""Which of several processes is at a shard: a file beside it with a lease. It saves work and decides nothing else.

A claim is made by linking a file of one's own to the claim's name, which fails where there is one. It is kept alive by
touching; one that nobody touched for the length of a lease belongs to a process that has died, and is taken over. Two that
take it over at once make the same bytes twice. Times are those of the file system, so clocks of machines do not matter.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_pipeline.preparing.work import Task

LEASE_SECONDS = 300.0


def claim_path(task: Task) -> Path:
    return task.output.with_name(f"{task.output.name.partition('.')[0]}.claim")


class Claims:
    """Claims of this process, kept alive by a thread until `close`."""

    def __init__(self, *, lease_seconds: float = LEASE_SECONDS) -> None:
        self._lease, self._held = lease_seconds, set[Path]()
        self._me = f"{socket.gethostname()} {os.getpid()} {uuid.uuid4().hex}\n"
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._keep_alive, name="claims", daemon=True)
        self._thread.start()

    def take(self, tasks: Sequence[Task]) -> Iterator[Task]:
        """Tasks that no other is at, each claimed when it is asked for."""
        return (task for task in tasks if self.claim(task))

    def claim(self, task: Task) -> bool:
        """Whether the task is ours from now on."""
        path = claim_path(task)
        path.parent.mkdir(parents=True, exist_ok=True)
        mine = path.with_name(f"{path.name}.part-{uuid.uuid4().hex[:8]}")
        try:
            mine.write_text(self._me)
            try:
                os.link(mine, path)
            except FileExistsError:
                if not self._is_stale(path, now=mine.stat().st_mtime):
                    return False
                mine.replace(path)
        finally:
            mine.unlink(missing_ok=True)
        with self._lock:
            self._held.add(path)
        return True

    def release(self, task: Task) -> None:
        """When the task is finished."""
        path = claim_path(task)
        with self._lock:
            self._held.discard(path)
        self._give_back(path)

    def close(self) -> None:
        """Give back what is still held."""
        self._stop.set()
        self._thread.join()
        for path in self._held:
            self._give_back(path)
        self._held.clear()

    def _give_back(self, path: Path) -> None:
        """Unless another has taken it over."""
        with contextlib.suppress(OSError):
            if path.read_text() == self._me:
                path.unlink()

    def _is_stale(self, path: Path, *, now: float) -> bool:
        try:
            return now - path.stat().st_mtime > self._lease
        except FileNotFoundError:
            return False  # just finished

    def _keep_alive(self) -> None:
        while not self._stop.wait(self._lease / 4):
            with self._lock:
                held = list(self._held)
            for path in held:
                with contextlib.suppress(OSError):  # taken over, or finished
                    os.utime(path)

"""Shards of a folder: some stay open, and a sample is one `preadv` into a buffer that is there already."""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

from data_pipeline.errors import MissingShard, why

Preadv = Callable[[int, Sequence[memoryview], int], int]

_RETRIES = 4
_BACKOFF_SECONDS = 0.05


class _File:
    """A file descriptor; closed when the last reader lets go of it, so eviction needs no lock."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        os.close(self.fd)


class OpenFiles:
    """Thread-safe. `path` gives that of a shard; at most `most` descriptors are kept."""

    def __init__(self, path: Callable[[int], Path], *, most: int, preadv: Preadv = os.preadv) -> None:
        self._path, self._most, self._preadv = path, most, preadv
        self._files: OrderedDict[int, _File] = OrderedDict()
        self._lock = threading.Lock()
        self.retries = 0

    def read(self, shard: int, *, start: int, into: memoryview) -> int:
        """Fill `into`; bytes that came: fewer only at the end of the file. Network file systems return short reads.

        Raises:
            MissingShard: the file cannot be opened, or reading fails after all retries.
        """
        file, got, failures = self._file(shard), 0, 0
        while got < len(into):
            try:
                num = self._preadv(file.fd, [into[got:] if got else into], start + got)
            except OSError as error:
                failures += 1
                if failures > _RETRIES:
                    path = self._path(shard)
                    words = f"reading failed {failures} times ({error.strerror})"
                    raise MissingShard(f"shard {path.name} in {path.parent}: {words}") from error
                with self._lock:
                    self.retries += 1
                time.sleep(_BACKOFF_SECONDS * 2 ** (failures - 1))
                continue
            if not num:
                break
            got += num
        return got

    def scatter(self, shard: int, *, start: int, into: Sequence[memoryview]) -> int:
        """One read into several pieces; bytes that came. Raises OSError, and MissingShard where the file cannot be opened."""
        file = self._file(shard)
        return self._preadv(file.fd, into, start)

    def close(self) -> None:
        with self._lock:
            self._files.clear()

    def _file(self, shard: int) -> _File:
        with self._lock:
            if (known := self._files.get(shard)) is not None:
                self._files.move_to_end(shard)
                return known
        path = self._path(shard)
        try:
            made = _File(os.open(path, os.O_RDONLY))
        except OSError as error:
            raise MissingShard(f"shard {path.name} in {path.parent}: {why(error)}") from error
        with self._lock:
            found = self._files.setdefault(shard, made)  # another thread may have been first
            self._files.move_to_end(shard)
            while len(self._files) > self._most:
                self._files.popitem(last=False)
        return found

"""A folder as a store, and its shards as open files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from data_pipeline.commit import write_committed
from data_pipeline.errors import MissingShard
from data_pipeline.store.contract import Found


class LocalStore:
    """See `contract.Store`."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.name = folder, str(folder)

    def sizes(self, paths: Iterable[str] | None = None) -> Iterator[Found]:
        """A file counts as changed when its content or its name did."""
        if paths is None:
            paths = sorted(p.relative_to(self._folder).as_posix() for p in self._folder.rglob("*") if p.is_file())
        for path in paths:
            try:
                status = os.stat(self._folder / path)
            except OSError:
                continue
            yield Found(path=path, size=status.st_size, changed=max(status.st_mtime, status.st_ctime))

    def read(self, path: str) -> bytes:
        try:
            return (self._folder / path).read_bytes()
        except OSError as error:
            raise MissingShard(f"{path} in {self.name}: {error.strerror}") from error

    def read_to(self, path: str, target: str) -> None:
        try:
            shutil.copyfile(self._folder / path, target)
        except OSError as error:
            raise MissingShard(f"{path} in {self.name}: {error.strerror}") from error

    def write(self, path: str, content: bytes) -> None:
        write_committed(content, self._folder / path)

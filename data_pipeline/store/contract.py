"""The whole of what the data pipeline asks of a place for files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, kw_only=True)
class Found:
    """A file of a store. `changed` in seconds since 1970."""

    path: str
    size: int
    changed: float


class Store(Protocol):
    """Files under one root; paths are relative to it, with `/`."""

    name: str
    """The root as a person writes it, for messages."""

    def sizes(self, paths: Iterable[str] | None = None) -> Iterator[Found]:
        """The named files that are there, or all files under the root, in the order of their names.

        Raises:
            StoreTrouble: the store cannot be asked; all files of a store that cannot list them.
        """
        ...

    def read(self, path: str) -> bytes:
        """A small file, whole. Raises MissingShard, StoreTrouble."""
        ...

    def read_to(self, path: str, target: str) -> None:
        """Copy a file of any size to a local path. Raises MissingShard, StoreTrouble."""
        ...

    def write(self, path: str, content: bytes) -> None:
        """The whole file or nothing. Raises StoreTrouble."""
        ...

"""What a reader asks of a committed checkpoint, whatever format describes it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ecdit_train.checkpoint.rank_file import TensorInfo
from ecdit_train.checkpoint.sums import Unit
from ecdit_train.parallel.placement import Box
from ecdit_train.parallel.runtime import Json


class Described(Protocol):
    """A tensor in a description."""

    @property
    def info(self) -> TensorInfo: ...


class Checked(Protocol):
    """The checksums of one file."""

    def around(self, start: int, stop: int) -> tuple[int, int]:
        """The smallest stretch around [start, stop) that can be checked."""
        ...

    def units(self, start: int, stop: int) -> Iterator[Unit]:
        """The checksums of a stretch that `around` gave, in order and without gaps."""
        ...


@dataclass(frozen=True, kw_only=True)
class Place:
    """The part of a stored box that was asked for; the box lies row-major from byte `start` of `file`."""

    file: str
    start: int
    box: Box
    part: Box


@dataclass(frozen=True, kw_only=True)
class Description(ABC):
    """Everything but the bytes. `world` and `torch_version` are of the writer, for people; a reader needs neither."""

    version: int
    step: int
    id: str
    world: int
    torch_version: str
    lineage: Json
    """Where it comes from, as the caller of `save` said; None in format 1."""
    objects: Mapping[str, Json]
    sha256: str

    @property
    @abstractmethod
    def tensors(self) -> Mapping[str, Described]:
        """By name: shape and dtype."""

    @property
    @abstractmethod
    def files(self) -> Mapping[str, int]:
        """Every file but the manifest, and its size."""

    @property
    @abstractmethod
    def data_files(self) -> Iterable[str]:
        """Those that hold tensors."""

    @abstractmethod
    def places(self, name: str, box: Box) -> Iterable[Place]:
        """Where the parts of a box of a tensor lie; together they are the box."""

    @abstractmethod
    def sums_of(self, folder: Path, file: str) -> Checked:
        """The checksums of a data file."""

    @abstractmethod
    def at(self, file: str, start: int, stop: int) -> str:
        """What lies there, in words: which boxes of which tensors."""

    @abstractmethod
    def problems(self, folder: Path) -> Iterator[str]:
        """What else than the bytes of data files is wrong with a folder (for `verify`)."""

    @property
    def nbytes(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(self.files.values())


def listed(names: Iterable[str]) -> str:
    """Up to 20 names in order."""
    ordered = sorted(set(names))
    return ", ".join(ordered[:20]) + (f", ... ({len(ordered)} in all)" if len(ordered) > 20 else "")

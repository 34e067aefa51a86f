"""What is prepared: pictures and captions in any of the forms in which they come, cut into pieces of one output shard each.

| form | what lies there |
|---|---|
| set | an indexed data set: `manifest.json` |
| tars | WebDataset tars, as img2dataset and others write them |
| parquet | img2dataset's parquet with the pictures' bytes in it |
| files | pictures in folders, captions beside them (`x.jpg`, `x.txt` or `x.json`) or in one table |

The pieces, their order and their names are decided by what lies there alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from data_pipeline.decode import Payload
from data_pipeline.errors import DataError, MissingShard
from data_pipeline.manifest import MANIFEST
from data_pipeline.preparing.work import Input

PICTURES = ("jpg", "jpeg", "png", "webp")
Form = Literal["set", "tars", "parquet", "files"]
FORMS: tuple[Form, ...] = ("set", "tars", "parquet", "files")


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What becomes one output shard."""

    name: str
    inputs: tuple[Input, ...]
    rows: Any = None
    """What its source needs to know besides."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """A sample as it lies there."""

    key: str
    fields: Mapping[str, Payload]
    file: str = ""
    """Of the form "files", the picture's path; its key is a number."""


@dataclass(frozen=True, kw_only=True)
class Lost:
    """Samples that are there and cannot be given."""

    reason: str
    words: str = ""
    count: int = 1


@dataclass(frozen=True, kw_only=True)
class Damaged:
    """Something that holds no sample, or samples that nobody can count."""

    words: str


@dataclass(frozen=True, kw_only=True)
class Sum:
    """sha256 of an input that was read."""

    name: str
    sha256: str


Item = Found | Lost | Damaged | Sum


class Source(Protocol):
    """A form of input; it can be pickled."""

    @property
    def form(self) -> Form: ...

    @property
    def folder(self) -> Path: ...

    @property
    def params(self) -> Mapping[str, Any]:
        """What besides the inputs decides the samples."""
        ...

    def pieces(self) -> Sequence[Piece]: ...

    def read(self, piece: Piece) -> Iterator[Item]:
        """Everything that a piece holds, in its order. The fields of a sample are good until the next is asked for."""
        ...


def find(folder: Path | str, *, form: Form | None = None, table: str | None = None, per_shard: int = 1000) -> Source:
    """The source in a folder, by what lies there.

    Args:
        form: None looks: an index first, then tars, then parquet files that hold pictures, then pictures.
        table: of the form "files", the csv, jsonl or parquet file with columns for file and caption; None looks for one.
        per_shard: of the form "files", pictures in an output shard.

    Raises:
        MissingShard: nothing of any form.
        DataError: a table that cannot be read.
    """
    from data_pipeline.preparing.source_files import FileSource, has_pictures
    from data_pipeline.preparing.source_parquet import ParquetSource, holds_pictures
    from data_pipeline.preparing.source_tars import SetSource, TarSource

    folder = Path(folder)
    if not folder.is_dir():
        raise MissingShard(f"{folder}: no such folder")
    if form is None:
        if (folder / MANIFEST).exists():
            form = "set"
        elif table is None and next(folder.rglob("*.tar"), None) is not None:
            form = "tars"
        elif table is None and any(holds_pictures(path) for path in sorted(folder.rglob("*.parquet"))[:1]):
            form = "parquet"
        elif has_pictures(folder):
            form = "files"
        else:
            raise MissingShard(
                f"{folder}: nothing to prepare; it may hold an indexed set ({MANIFEST}), *.tar, *.parquet with a column of "
                f"pictures ({', '.join(PICTURES)}), or pictures"
            )
    if form == "files":
        return FileSource(folder=folder, table=table, per_shard=per_shard)
    return {"set": SetSource, "tars": TarSource, "parquet": ParquetSource}[form](folder=folder)


def refuse_inside(source: Source, folder: Path) -> None:
    """Raises DataError where what is written would be among what is read next time."""
    if folder.resolve().is_relative_to(source.folder.resolve()):
        raise DataError(f"{folder} lies inside of what is read ({source.folder}); choose a folder beside it")


def inputs_of(folder: Path, paths: Sequence[Path]) -> tuple[Input, ...]:
    return tuple(
        Input(path=path, name=path.relative_to(folder).as_posix(), bytes=path.stat().st_size) for path in paths
    )


def listed(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """Files by their suffixes (lower case, with a dot), in all folders that are not hidden, sorted by their path."""
    found: list[Path] = []
    for where, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(where, n) for n in names if not n.startswith(".") and n.lower().endswith(tuple(suffixes))]
    return sorted(found, key=lambda path: path.relative_to(folder).parts)

"""Pictures in folders, each with a caption beside it or all captions in one table. img2dataset's `files` output is one of these."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.preparing.duck import columns_of, rows_of
from data_pipeline.preparing.sources import PICTURES, Form, Found, Item, Lost, Piece, Sum, inputs_of, listed
from data_pipeline.preparing.work import file_sha256

CAPTIONS = ("txt", "json")
TABLES = ("captions", "metadata")
"""Names, before the suffix, of a table that is found without being told."""
FILE_COLUMNS = ("file", "file_name", "filename", "image", "path")
CAPTION_COLUMNS = ("caption", "text", "txt", "prompt")
_ENDINGS = tuple(f".{suffix}" for suffix in PICTURES)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One picture."""

    file: str
    there: bool
    captions: tuple[str, ...]
    """Files beside it."""
    about: dict[str, Any] | None
    """Its row of the table."""


def has_pictures(folder: Path) -> bool:
    return any(path.suffix.lower() in _ENDINGS for path in folder.rglob("*"))


@dataclass(frozen=True, kw_only=True)
class FileSource:
    """`per_shard` pictures a piece, sorted by their path."""

    folder: Path
    table: str | None = None
    per_shard: int = 1000
    form: Form = "files"

    @cached_property
    def params(self) -> dict[str, Any]:
        table = self._find_table()
        return {
            "form": self.form, "per_shard": self.per_shard,
            "table_sha256": file_sha256(table) if table is not None and table.exists() else None,
        }  # fmt: skip

    def pieces(self) -> list[Piece]:
        """Of pictures and of what the table names besides. Raises DataError for a table that cannot be read."""
        pictures = {path.relative_to(self.folder).as_posix(): path for path in listed(self.folder, _ENDINGS)}
        beside = {path.relative_to(self.folder).as_posix(): path for path in listed(self.folder, (".txt", ".json"))}
        table = self._table()
        names = sorted(pictures.keys() | table.keys(), key=lambda name: name.split("/"))
        found = []
        for number, first in enumerate(range(0, len(names), self.per_shard)):
            paths, rows = [], []
            for name in names[first : first + self.per_shard]:
                stem = name.removesuffix(Path(name).suffix)
                captions = [f"{stem}.{c}" for c in CAPTIONS if name in pictures and f"{stem}.{c}" in beside]
                paths += [pictures[name], *(beside[caption] for caption in captions)] if name in pictures else []
                rows.append(Row(file=name, there=name in pictures, captions=tuple(captions), about=table.get(name)))
            inputs = inputs_of(self.folder, list(dict.fromkeys(paths)))
            found.append(Piece(name=f"{number:06d}", inputs=inputs, rows=tuple(rows)))
        return found

    def read(self, piece: Piece) -> Iterator[Item]:
        for number, row in enumerate(piece.rows):
            if not row.there:
                yield Lost(reason="no picture", words=f"{row.file}: named in the table only")
                continue
            fields = {} if row.about is None else _of_table(row.about)
            try:
                for file in (row.file, *row.captions):
                    content = (self.folder / file).read_bytes()
                    fields[file.rpartition(".")[2].lower()] = content
                    yield Sum(name=file, sha256=hashlib.sha256(content).hexdigest())
            except OSError as error:
                yield Lost(reason="unreadable", words=f"{row.file}: {error.strerror}")
                continue
            # A path can be long, or no name for a member, so a number is the key.
            yield Found(key=f"{piece.name}-{number:06d}", fields=fields, file=row.file)

    def _table(self) -> dict[str, dict[str, Any]]:
        """Rows by the name of their file, the caption under `caption`."""
        path = self._find_table()
        if path is None:
            return {}
        columns = columns_of(path)
        file = next((name for name in FILE_COLUMNS if name in columns), None)
        caption = next((name for name in CAPTION_COLUMNS if name in columns), None)
        if file is None or caption is None:
            missing, known = ("file", FILE_COLUMNS) if file is None else ("caption", CAPTION_COLUMNS)
            raise DataError(
                f"{path}: no column for the {missing}: must be one of {', '.join(known)}; there are {', '.join(columns)}"
            )
        return {Path(str(row[file])).as_posix(): {**row, "caption": row[caption]} for row in rows_of(path)}

    def _find_table(self) -> Path | None:
        if self.table is not None:
            given = Path(self.table)
            return given if given.exists() else self.folder / given
        for name in TABLES:
            for suffix in (".csv", ".jsonl", ".parquet"):
                if (path := self.folder / f"{name}{suffix}").exists():
                    return path
        return None


def _of_table(about: dict[str, Any]) -> dict[str, bytes]:
    fields = {
        "json": json.dumps(about, sort_keys=True, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass")
    }
    if isinstance(about["caption"], str):
        fields["txt"] = about["caption"].encode("utf-8", "surrogatepass")
    return fields

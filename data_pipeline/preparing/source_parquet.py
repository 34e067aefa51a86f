"""Samples of img2dataset's parquet files: a row each, the picture's bytes in a column of its suffix."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import BadMember, DataError
from data_pipeline.preparing.duck import columns_of, rows_of
from data_pipeline.preparing.sources import PICTURES, Damaged, Form, Found, Item, Lost, Piece, inputs_of, listed
from data_pipeline.tar import split_name

CAPTIONS = ("caption", "text", "txt")


def holds_pictures(path: Path) -> bool:
    """Whether a parquet file has a column of pictures (side files of img2dataset have none)."""
    try:
        return picture_column(columns_of(path)) is not None
    except DataError:
        return False


def picture_column(columns: dict[str, str]) -> str | None:
    return next((name for name in PICTURES if columns.get(name) == "BLOB"), None)


@dataclass(frozen=True, kw_only=True)
class ParquetSource:
    """A shard for each file. Columns besides picture and caption go into the sample's json."""

    folder: Path
    form: Form = "parquet"

    @property
    def params(self) -> dict[str, Any]:
        return {"form": self.form}

    def pieces(self) -> list[Piece]:
        files = [path for path in listed(self.folder, (".parquet",)) if holds_pictures(path)]
        return [Piece(name=one.name, inputs=(one,)) for one in inputs_of(self.folder, files)]

    def read(self, piece: Piece) -> Iterator[Item]:
        path = piece.inputs[0].path
        try:
            columns = columns_of(path)
            picture, rows = picture_column(columns), rows_of(path)
        except DataError as error:
            yield Damaged(words=str(error))
            return
        assert picture is not None
        caption = next((name for name in CAPTIONS if name in columns), None)
        keys: set[str] = set()
        for number, row in enumerate(rows):
            key = _key(row.get("key"), number)
            payload = row.pop(picture)
            if key in keys:
                yield Lost(reason="key comes again", words=key)
            elif not payload:
                status = row.get("status")
                yield Lost(reason="no picture" if status in (None, "success") else f"no picture: {status}", words=key)
            else:
                yield Found(key=key, fields=_fields(row, payload, picture=picture, caption=caption))
            keys.add(key)


def _fields(row: dict[str, Any], payload: bytes, *, picture: str, caption: str | None) -> dict[str, bytes]:
    fields = {picture: payload}
    if caption is not None and isinstance(row[caption], str):
        fields["txt"] = row[caption].encode("utf-8", "surrogatepass")
    about = {name: value for name, value in row.items() if not isinstance(value, bytes | bytearray)}
    fields["json"] = json.dumps(about, sort_keys=True, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass")
    return fields


def _key(told: Any, number: int) -> str:
    """The one that is told, where it can be the name of a member; else the row's number."""
    try:
        if isinstance(told, str | int) and split_name(f"{told}.txt") == (str(told), "txt"):
            return str(told)
    except BadMember:
        pass
    return f"{number:09d}"

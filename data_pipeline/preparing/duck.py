"""DuckDB over tables that lie in files: parquet, csv, jsonl. One thread, in the order of the file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError

_READERS = {
    ".parquet": "read_parquet",
    ".csv": "read_csv",
    ".tsv": "read_csv",
    ".jsonl": "read_json",
    ".json": "read_json",
}
SUFFIXES = tuple(_READERS)
ROWS = 64
"""Fetched at once; of a table with pictures in it, some megabytes."""


def connect() -> Any:
    import duckdb

    return duckdb.connect(
        config={"threads": 1, "autoinstall_known_extensions": False, "autoload_known_extensions": False}
    )


def error_class() -> type[Exception]:
    """What DuckDB raises."""
    import duckdb

    return duckdb.Error


def columns_of(path: Path) -> dict[str, str]:
    """Name -> type as DuckDB names it. Raises DataError."""
    return {name: kind for name, kind, *_ in _execute(f"DESCRIBE SELECT * FROM {_table(path)}", path).fetchall()}


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a table, in its order. Raises DataError before the first."""
    cursor = _execute(f"SELECT * FROM {_table(path)}", path)
    return _fetch(cursor, path)


def quoted(text: str) -> str:
    """As SQL's text."""
    return "'" + text.replace("'", "''") + "'"


def files_of(paths: Sequence[Path]) -> str:
    """As SQL's list. DuckDB takes * ? [ in a name for a pattern."""
    names = ("".join(f"[{letter}]" if letter in "*?[" else letter for letter in str(path)) for path in paths)
    return "[" + ", ".join(map(quoted, names)) + "]"


def _fetch(cursor: Any, path: Path) -> Iterator[dict[str, Any]]:
    names = [column[0] for column in cursor.description]
    while True:
        try:
            rows = cursor.fetchmany(ROWS)
        except error_class() as error:
            raise DataError(f"{path}: {_first_line(error)}") from error
        if not rows:
            return
        for row in rows:
            yield dict(zip(names, row, strict=True))


def _table(path: Path) -> str:
    if path.suffix.lower() not in _READERS:
        raise DataError(f"{path}: a table is one of {', '.join(SUFFIXES)}")
    return f"{_READERS[path.suffix.lower()]}({files_of([path])})"


def _execute(sql: str, path: Path) -> Any:
    if not path.exists():
        raise DataError(f"{path}: no such table")
    try:
        return connect().execute(sql)
    except error_class() as error:
        raise DataError(f"{path}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0][:300]

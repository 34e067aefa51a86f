"""Which samples of a data set satisfy a condition in SQL: DuckDB over the tables of `facts`, and img2dataset's side files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.manifest import View
from data_pipeline.parts import Part
from data_pipeline.preparing import drive
from data_pipeline.preparing.drive import Done, Watch
from data_pipeline.preparing.duck import connect, error_class, files_of, quoted
from data_pipeline.preparing.facts import OWN, FactsWork
from data_pipeline.preparing.local import Runner
from data_pipeline.preparing.source_tars import SetSource

AT_ONCE = 64
"""Shards that one query reads."""


class BadFilterError(DataError):
    """A condition that is no SQL, or names a column that no sample has."""


@dataclass(frozen=True, kw_only=True)
class Selected:
    """What a condition says of a data set's samples."""

    view: View
    mask: np.ndarray
    """bool (N,), in the manifest's order"""
    unknown: int
    """samples of which it says neither yes nor no, since a value is missing; not kept"""

    def lines(self) -> list[str]:
        """For people."""
        kept = int(self.mask.sum())
        return [
            f"kept         {kept:>12,} of {len(self.mask):,} samples ({100 * kept / max(len(self.mask), 1):.2f} %)",
            f"dropped      {len(self.mask) - kept - self.unknown:>12,} samples: the condition does not hold",
            *(
                [f"dropped      {self.unknown:>12,} samples: it cannot be told, a value is missing"]
                if self.unknown
                else []
            ),
        ]


def make_facts(
    folder: Path | str, *, tables: Path | None = None, runner: Runner | None = None, part: Part | None = None,
    watch: Watch | None = None,
) -> tuple[FactsWork, Done]:  # fmt: skip
    """The tables of a data set, in `tables/facts` inside of it by default; those that are there are not made again."""
    source = SetSource(folder=Path(folder))
    work = FactsWork(source=source, folder=tables_of(folder, tables) / "facts")
    return work, drive.run(work, work.folder, runner=runner, part=part, watch=watch)


def tables_of(folder: Path | str, tables: Path | None) -> Path:
    return Path(folder) / "tables" if tables is None else tables


def select(work: FactsWork, *, where: str) -> Selected:
    """Ask the tables of `make_facts`.

    Args:
        where: a condition on one sample, in DuckDB's SQL: `width >= 256 and similarity > 0.3`.

    Raises:
        BadFilterError: anything wrong with it, and the columns that there are.
    """
    view = work.source.view
    files = [task.output for task in work.tasks()]
    side = [path if (path := view.tar(n).with_suffix(".parquet")).exists() else None for n in range(len(view.shards))]
    asking = _Asking(files=files, side=side, where=where)
    starts = np.cumsum([0, *view.shard_sizes])
    mask = np.zeros(view.num_samples, bool)
    unknown = 0
    for shard, sample, holds in asking.answers():
        position = starts[shard] + sample
        mask[position[holds == 1]] = True
        unknown += int((holds == 2).sum())
    return Selected(view=view, mask=mask, unknown=unknown)


def check_grammar(where: str) -> None:
    """Raises BadFilterError for what is no condition, before any table is made; columns are known afterwards."""
    sql = f"SELECT 1 FROM samples WHERE ({where}\n)"
    try:
        ((said,),) = connect().execute("SELECT json_serialize_sql(?)", [sql]).fetchall()
    except error_class() as error:
        raise BadFilterError(f"where = {where!r}: {error}") from error
    answer = json.loads(said)
    if answer["error"]:
        raise BadFilterError(f"where = {where!r}: {str(answer.get('error_message'))[:300]}")
    if len(answer["statements"]) != 1:
        raise BadFilterError(f"where = {where!r}: more than one statement; must be one condition on a sample")


class _Asking:
    """A few shards at a time, with the types that columns have over all of them."""

    def __init__(self, *, files: Sequence[Path], side: Sequence[Path | None], where: str) -> None:
        self._files, self._where, self._db, self._error = files, where, connect(), error_class()
        described = self._described(f"read_json({files_of(files)}, {_HOW})")
        found = {name: kind for name, kind, *_ in described}
        self._columns = {**found, **OWN}
        self._side = [(number, path) for number, path in enumerate(side) if path is not None]
        self._more: dict[str, str] = {}
        if self._side:
            paths = files_of([path for _, path in self._side])
            table = self._described(f"read_parquet({paths}, union_by_name = true)")
            known = {name.lower() for name in self._columns}
            if any(name == "key" for name, *_ in table):
                self._more = {name: kind for name, kind, *_ in table if name.lower() not in known and kind != "BLOB"}

    def _described(self, source: str) -> list[tuple[Any, ...]]:
        try:
            return self._db.execute(f"DESCRIBE SELECT * FROM {source}").fetchall()
        except self._error as error:
            raise BadFilterError(f"what is known of the samples cannot be read: {error}") from error

    def answers(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(shard, sample, 1 where the condition holds, 2 where nobody can tell), of those that are not plainly dropped."""
        for first in range(0, len(self._files), AT_ONCE):
            table = self._table(first)
            # In WHERE, so that windows and aggregates are refused: they would see a part of the samples only.
            sql = (
                f"SELECT shard, sample, 1 AS holds FROM ({table}) WHERE ({self._where}\n) UNION ALL "
                f"SELECT shard, sample, 2 FROM ({table}) WHERE (({self._where}\n)) IS NULL"
            )
            try:
                found = self._db.execute(sql).fetchnumpy()
            except self._error as error:
                words = str(error).split("\n\nLINE", 1)[0].replace("\n", " ")
                columns = ", ".join(sorted([*self._columns, *self._more]))
                raise BadFilterError(f"where = {self._where!r}: {words[:300]}; there are columns {columns}") from error
            yield tuple(np.asarray(found[name]).astype(np.int64) for name in ("shard", "sample", "holds"))  # type: ignore[misc]

    def _table(self, first: int) -> str:
        types = ", ".join(f"{quoted(name)}: {quoted(kind)}" for name, kind in self._columns.items())
        files = self._files[first : first + AT_ONCE]
        facts = f"SELECT * FROM read_json({files_of(files)}, format = 'newline_delimited', columns = {{{types}}})"
        side = [(number, path) for number, path in self._side if first <= number < first + AT_ONCE]
        if not self._more or not side:
            missing = "".join(f', NULL::{kind} AS "{name}"' for name, kind in self._more.items())
            return f"SELECT *{missing} FROM ({facts})"
        more = ", ".join(f's."{name}"' for name in self._more)
        where = ", ".join(f"({quoted(str(path))}, {number})" for number, path in side)
        columns = ", ".join(f'any_value("{name}") AS "{name}"' for name in self._more)
        beside = (
            f"SELECT CAST(key AS VARCHAR) AS key, number, {columns} FROM read_parquet("
            f"{files_of([path for _, path in side])}, union_by_name = true, filename = '_file') "
            f"JOIN (VALUES {where}) AS files(path, number) ON _file = path GROUP BY ALL"
        )
        return f"SELECT f.*, {more} FROM ({facts}) f LEFT JOIN ({beside}) s ON f.shard = s.number AND f.key = s.key"


_HOW = "format = 'newline_delimited', union_by_name = true, sample_size = -1"

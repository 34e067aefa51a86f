"""What is known of each sample of a data set, as tables that SQL can ask: one for each shard, made once, as any task.

A row holds the keys of the sample's json and, over them, what its members say themselves: `shard` and `sample` (numbers), `key`,
`caption`, `caption_length` (letters), `width`, `height`, `aspect` (longer / shorter), `bytes` (of the picture), `problem`.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.assemble import IMAGE_SUFFIXES
from data_pipeline.decode import upright_size
from data_pipeline.errors import SAMPLE_ERRORS, DataError, Where
from data_pipeline.preparing.pack import caption_of
from data_pipeline.preparing.source_tars import SetSource
from data_pipeline.preparing.sources import Found
from data_pipeline.preparing.work import Count, Service, Task

OWN = {
    "shard": "BIGINT", "sample": "BIGINT", "key": "VARCHAR", "caption": "VARCHAR", "caption_length": "BIGINT",
    "width": "BIGINT", "height": "BIGINT", "aspect": "DOUBLE", "bytes": "BIGINT", "problem": "VARCHAR",
}  # fmt: skip
"""Name -> DuckDB's type."""


MAX_DEPTH = 64
"""Of what is kept of a sample's json; DuckDB reads 128."""


@dataclass(frozen=True, kw_only=True)
class FactsWork:
    """`work.Work`: `000000.jsonl.gz`, ... in a folder, by the number of the shard."""

    source: SetSource
    folder: Path
    service: None = None

    @property
    def params(self) -> Mapping[str, Any]:
        return {"made_by": "facts", "version": 1, "source": self.source.params}

    def tasks(self) -> list[Task]:
        return table_tasks(self.source, self.folder, suffix=".jsonl.gz")

    def make(self, task: Task, *, out: Path, service: Service | None) -> Count:
        count = Count(sums={task.piece.name: self.source.view.shards[task.number].sha256})
        with out.open("wb") as raw, gzip.GzipFile("", "wb", compresslevel=3, fileobj=raw, mtime=0) as file:
            for sample, found in enumerate(self.source.every(task.piece)):
                row = _row(found, where=Where(task.piece.name, getattr(found, "key", f"number {sample}")))
                if row["problem"] is None:
                    count.keep()
                else:
                    count.reject("unreadable", words=row["problem"])
                line = json.dumps({**row, "shard": task.number, "sample": sample}, sort_keys=True, default=str)
                file.write(line.encode() + b"\n")
        return count


def table_tasks(source: SetSource, folder: Path, *, suffix: str) -> list[Task]:
    """A table for each shard of a set."""
    return [
        Task(number=number, output=folder / f"{number:06d}{suffix}", inputs=piece.inputs, piece=piece)
        for number, piece in enumerate(source.pieces())
    ]


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """Of one table."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def _tame(value: Any, *, depth: int = 0) -> Any:
    """A json that any reader takes: no half of a surrogate pair, and nothing deeper than `MAX_DEPTH`."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if depth >= MAX_DEPTH and isinstance(value, dict | list):
        return None
    if isinstance(value, dict):
        return {_tame(name): _tame(one, depth=depth + 1) for name, one in value.items()}
    if isinstance(value, list):
        return [_tame(one, depth=depth + 1) for one in value]
    return value


def _row(found: Found | DataError, *, where: Where) -> dict[str, Any]:
    nothing = dict.fromkeys(OWN)
    if isinstance(found, DataError):
        return {**nothing, "problem": str(found)}
    about: dict[str, Any] = {}
    row: dict[str, Any] = {"key": found.key}
    try:
        if "json" in found.fields:
            loaded = json.loads(str(found.fields["json"], "utf-8"), parse_constant=lambda _: None)
            about = _tame(loaded) if isinstance(loaded, dict) else {}
        caption = caption_of(found, [name for name in ("txt", "json") if name in found.fields], where=where)
        row |= {"caption": caption, "caption_length": len(caption or "")}
        picture = next((suffix for suffix in IMAGE_SUFFIXES if suffix in found.fields), None)
        if picture is not None:
            height, width = upright_size(found.fields[picture], where=where)
            row |= {"height": height, "width": width, "bytes": len(found.fields[picture])}
            row |= {"aspect": round(max(height, width) / max(min(height, width), 1), 4)}
    except (*SAMPLE_ERRORS, ValueError, RecursionError) as error:
        row["problem"] = str(error)
    return {**_plain(about), **nothing, **row}


def _plain(about: dict[str, Any]) -> dict[str, Any]:
    """Without keys that differ from ours, or from each other, in their case only: SQL does not tell them apart."""
    named: dict[str, Any] = {}
    taken = set(OWN)
    for key, value in about.items():
        if key.lower() not in taken:
            taken.add(key.lower())
            named[key] = value
    return named

"""Samples of tars: plain ones, damaged or not, and those of an indexed data set."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data_pipeline.errors import SAMPLE_ERRORS, DataError, MissingShard
from data_pipeline.index import index_path, scan
from data_pipeline.manifest import View, open_view, read_manifest
from data_pipeline.preparing.sources import Damaged, Form, Found, Item, Lost, Piece, Sum, inputs_of, listed
from data_pipeline.preparing.work import Input
from data_pipeline.reader import ShardReader


@dataclass(frozen=True, kw_only=True)
class TarSource:
    """Every whole sample of every tar. Others are lost and counted; a damaged tar says so besides."""

    folder: Path
    form: Form = "tars"

    @property
    def params(self) -> dict[str, Any]:
        return {"form": self.form}

    def pieces(self) -> list[Piece]:
        tars = listed(self.folder, (".tar",))
        inputs = inputs_of(self.folder, tars)
        return [Piece(name=one.name, inputs=(one,)) for one in inputs]

    def read(self, piece: Piece) -> Iterator[Item]:
        path, name = piece.inputs[0].path, piece.name
        try:
            scanned = scan(path)
        except DataError as error:
            yield Damaged(words=str(error))
            return
        yield Sum(name=name, sha256=scanned.index.tar_sha256)
        for damage in scanned.found.damage:
            yield Damaged(words=f"{name}: {damage.words}")
        for reason, count in scanned.found.rejected.items():
            yield Lost(reason=reason, count=count)
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
            for sample in scanned.found.samples:
                fields = {field: buffer[at.data : at.data + at.size] for field, at in sample.fields.items()}
                yield Found(key=sample.key, fields=fields)


@dataclass(frozen=True)
class SetSource:
    """The samples of an indexed data set, each held against its checksum. Only what its index names is there."""

    folder: Path
    form: Form = "set"

    @property
    def params(self) -> dict[str, Any]:
        return {"form": self.form, "view_sha256": self.view.sha256}

    @cached_property
    def view(self) -> View:
        return read_manifest(self.folder) if vars(self).get("checked") else open_view(self.folder)

    def __getstate__(self) -> dict[str, Any]:
        """Of what was opened here, only that it was: other processes need not look at every file again."""
        return {"folder": self.folder, "form": self.form, "checked": "view" in vars(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def pieces(self) -> list[Piece]:
        found = []
        for number, row in enumerate(self.view.shards):
            path = self.view.tar(number)
            if self.view.base and not index_path(path).exists():
                rule = f"index them here first: ecdit data index {self.view.base} --out FOLDER"
                raise MissingShard(f"no index of {row.name} in {self.folder}: {rule}")
            # An index names its tar's sum: of a tar that lies in a store it is all that is looked at here.
            tar = () if self.view.base else (Input(path=path, name=row.name, bytes=row.bytes),)
            found.append(Piece(name=row.name, inputs=(*tar, *inputs_of(self.folder, [index_path(path)])), rows=number))
        return found

    def read(self, piece: Piece) -> Iterator[Item]:
        yield Sum(name=piece.name, sha256=self.view.shards[piece.rows].sha256)  # each sample has a checksum of its own
        for found in self.every(piece):
            yield found if isinstance(found, Found) else Lost(reason="damaged", words=str(found))

    def every(self, piece: Piece) -> Iterator[Found | DataError]:
        """All samples of a shard in its order, or what is wrong with one."""
        reader = ShardReader(self.view)
        try:
            for sample in range(self.view.shards[piece.rows].n):
                try:
                    raw = reader.read(piece.rows, sample=sample)
                except SAMPLE_ERRORS as error:
                    yield error
                else:
                    yield Found(key=raw.key, fields=raw.payloads)
        finally:
            reader.close()

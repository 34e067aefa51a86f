"""From a folder of plain WebDataset tars to a data set: an `.idx` beside each tar and one manifest. Tars stay untouched.

One damaged tar is no reason to refuse the others, and what is not used is counted (`tally`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from data_pipeline.errors import BadMember, ChangedShard, CorruptShard, DataError, MissingShard, StoreTrouble
from data_pipeline.index import COMPRESSED, Index, index_path, load_index, refuse_damage, scan, write_index
from data_pipeline.manifest import View, describe, raise_all, read_manifest, write_manifest
from data_pipeline.parts import Part
from data_pipeline.tally import Tally, read_tally, table, tally_path, write_tally
from data_pipeline.tars import LocalTars, Tars

OnBadShard = Literal["set_aside", "salvage", "fail"]
ON_BAD_SHARD: tuple[OnBadShard, ...] = ("set_aside", "salvage", "fail")
_COMPRESSED_NAMES = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")


@dataclass(frozen=True, kw_only=True)
class Indexed:
    """A data set, and what its tars hold besides it."""

    view: View
    tallies: Mapping[str, Tally]
    """By the tar's path in the folder."""


def index_folder(folder: Path | str, *, on_bad_shard: OnBadShard = "fail", again: bool = False) -> View:
    """The data set of `index_tars`, by one process."""
    indexed = index_tars(folder, on_bad_shard=on_bad_shard, again=again)
    assert indexed is not None
    return indexed.view


def index_tars(
    folder: Path | str,
    *,
    on_bad_shard: OnBadShard = "set_aside",
    again: bool = False,
    part: Part | None = None,
    tars_at: Tars | None = None,
) -> Indexed | None:
    """Index all tars of a folder and of those in it.

    Args:
        folder: where indexes and the manifest are written.
        tars_at: where the tars lie, if not there.
        on_bad_shard: of a damaged tar, "set_aside" uses no sample, "salvage" those that are certainly whole; "fail" raises.
        again: read tars whose index is fresh, too. Otherwise an index that is newer than its tar and names its size is kept, so an
            interrupted pass goes on where it stopped.
        part: read only its tars. It writes the manifest if it finds that the others have been read, else it returns None.

    Raises:
        MissingShard: no `*.tar` here.
        BadMember: no sample in any.
        DataError: "fail": the class of the first bad tar, a line for each; else if no tar can be used.
    """
    folder = Path(folder)
    source: Tars = tars_at or LocalTars(folder=folder)
    files = source.files()
    tars = [path for path in files if path.suffix == ".tar" and not _is_hidden(path.relative_to(folder))]
    packed = [path for path in files if path.name.endswith(_COMPRESSED_NAMES)]
    if not tars and not packed:
        raise MissingShard(f"no *.tar in {source.base or folder}")
    mine = dict.fromkeys(tars if part is None else part.mine(tars))
    found = {tar: _read(tar, source=source, again=again) for tar in mine}
    for tar in tars:
        if tar not in found:
            if (known := _known(tar, source=source)) is None:
                return None
            found[tar] = known
    found |= {path: _Found(tally=Tally(), problem=_packed(path)) for path in packed}
    names = {path: path.relative_to(folder).as_posix() for path in found}
    use = {
        path: one.index for path, one in found.items()
        if one.index is not None and (one.problem is None or on_bad_shard == "salvage")
    }  # fmt: skip
    problems = {path: one.problem for path, one in sorted(found.items()) if one.problem is not None and path not in use}
    if problems and (on_bad_shard == "fail" or not use):
        raise_all(list(problems.values()))
    tallies = {
        names[path]: replace(one.tally, accepted=0, set_aside=str(problems[path])) if path in problems else one.tally
        for path, one in sorted(found.items())
    }
    shards = [describe(path, index=index, folder=folder) for path, index in sorted(use.items())]
    if shards and not any(row.n for row in shards) and any(not tally.is_plain for tally in tallies.values()):
        raise BadMember("\n".join([f"{folder}: no sample in {len(tars)} tars", *table(tallies)[1:]]))
    try:
        known_view = read_manifest(folder)
    except DataError:
        known_view = None
    if known_view is not None and known_view.shards == tuple(shards) and known_view.base == source.base:
        # The same tars keep the same view, whoever wrote the manifest: a run on them can go on.
        return Indexed(view=known_view, tallies=tallies)
    meta = {"made_by": "index_folder"} | (
        {"set_aside": {names[p]: str(e) for p, e in problems.items()}} if problems else {}
    )
    return Indexed(view=write_manifest(folder, shards=shards, meta=meta, base=source.base), tallies=tallies)


def tallies_of(view: View) -> dict[str, Tally]:
    """Of an indexed folder, as they were written; tars that were set aside too."""
    found = {row.name: read_tally(view.tar(number), accepted=row.n) for number, row in enumerate(view.shards)}
    for name, why in view.meta.get("set_aside", {}).items():
        found[name] = replace(read_tally(view.folder / name, accepted=0), accepted=0, set_aside=why)
    return found


@dataclass(frozen=True, kw_only=True)
class _Found:
    """What is known of a tar."""

    tally: Tally
    index: Index | None = None
    """Of its whole samples; None where it cannot be read at all."""
    problem: DataError | None = None


def _read(tar: Path, *, source: Tars, again: bool) -> _Found:
    """A tar's index, made anew unless it is known."""
    if not again and (known := _known(tar, source=source)) is not None:
        return known
    try:
        with source.here(tar) as readable:
            scanned = scan(readable)
    except (StoreTrouble, ChangedShard, MissingShard):
        raise  # says nothing of the tar: only what stands in bytes that were read is written down
    except DataError as error:
        index_path(tar).unlink(missing_ok=True)
        write_tally(Tally(set_aside=str(error)), tar)
        return _Found(tally=Tally(), problem=error)
    tally, problem = Tally.of(scanned.found), None
    try:
        refuse_damage(tar, scanned.found)
    except DataError as error:
        problem = error
    write_tally(tally, tar)  # first: a fresh index says that there is no more to know
    write_index(scanned.index, index_path(tar))
    return _Found(index=scanned.index, tally=tally, problem=problem)


def _known(tar: Path, *, source: Tars) -> _Found | None:
    """What was found of a tar that has not changed since."""
    try:
        size, changed = source.status(tar)
        if index_path(tar).exists():
            index = load_index(index_path(tar))
            if index_path(tar).stat().st_mtime_ns < changed or index.tar_bytes != size:
                return None
            tally = read_tally(tar, accepted=len(index))
            words = f"shard {tar.name}: {'; '.join(tally.damage)}; {tally.accepted} whole samples"
            return _Found(index=index, tally=tally, problem=CorruptShard(words) if tally.damage else None)
        tally = read_tally(tar, accepted=0)
        if tally.set_aside and tally_path(tar).stat().st_mtime_ns >= changed:
            return _Found(tally=Tally(), problem=CorruptShard(tally.set_aside))
    except (DataError, OSError):
        pass
    return None


def _packed(path: Path) -> DataError:
    command = next((c for what, c in COMPRESSED.values() if path.name.endswith(_ENDINGS[what])), "unpack")
    plain = path.with_name(f"{path.name.partition('.')[0]}.tar")
    rule = f"samples of a compressed tar cannot be read where they lie; unpack it: {command} {path} > {plain}"
    return CorruptShard(f"{path.name} is compressed: {rule}")


_ENDINGS = {"gzip": ("gz", "tgz"), "zstd": ("zst",), "bzip2": ("bz2",), "xz": ("xz",)}


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)

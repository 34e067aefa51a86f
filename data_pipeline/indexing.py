"""From a folder of plain WebDataset tars to a data set: an `.idx` beside each tar and one manifest. Tars stay untouched.

One damaged tar is no reason to refuse the others, and what is not used is counted (`tally`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from data_pipeline.errors import BadMember, CorruptShard, DataError, MissingShard
from data_pipeline.gather import Gathered
from data_pipeline.index import COMPRESSED, Index, index_path, load_index, refuse_damage, scan, write_index
from data_pipeline.manifest import Shard, View, describe, raise_all, read_manifest, write_manifest
from data_pipeline.tally import Tally, read_tally, table, write_tally

OnBadShard = Literal["set_aside", "salvage", "fail"]
ON_BAD_SHARD: tuple[OnBadShard, ...] = ("set_aside", "salvage", "fail")
_COMPRESSED_NAMES = ("*.tar.gz", "*.tgz", "*.tar.zst", "*.tar.bz2", "*.tar.xz")


@dataclass(frozen=True, kw_only=True)
class Indexed:
    """A data set, and what its tars hold besides it."""

    view: View
    tallies: Mapping[str, Tally]
    """By the tar's path in the folder."""


def index_folder(folder: Path | str, *, on_bad_shard: OnBadShard = "fail", again: bool = False) -> View:
    """The data set of `index_tars`."""
    return index_tars(folder, on_bad_shard=on_bad_shard, again=again).view


def index_tars(folder: Path | str, *, on_bad_shard: OnBadShard = "set_aside", again: bool = False) -> Indexed:
    """Index all tars of a folder and of those in it.

    Args:
        on_bad_shard: of a damaged tar, "set_aside" uses no sample, "salvage" those that are certainly whole; "fail" raises.
        again: read tars whose index is fresh, too. Otherwise an index that is newer than its tar and names its size is kept, so an
            interrupted pass goes on where it stopped.

    Raises:
        MissingShard: no `*.tar` here.
        DataError: "fail": the class of the first bad tar, a line for each; else if no tar can be used.
    """
    folder = Path(folder)
    tars = sorted(path for path in folder.rglob("*.tar") if not _is_hidden(path.relative_to(folder)))
    packed = sorted({path for pattern in _COMPRESSED_NAMES for path in folder.rglob(pattern)})
    if not tars and not packed:
        raise MissingShard(f"no *.tar in {folder}")
    shards: list[Shard] = []
    tallies: dict[str, Tally] = {}
    problems: list[DataError] = []
    for tar in tars:
        name = tar.relative_to(folder).as_posix()
        try:
            index, tally, problem = _index(tar, again=again)
        except DataError as error:
            index, tally, problem = None, Tally(), error
        if problem is not None and on_bad_shard != "salvage":
            index = None
        if index is None:
            assert problem is not None
            problems.append(problem)
            tally = replace(tally, accepted=0, set_aside=str(problem))
        else:
            shards.append(describe(tar, index=index, folder=folder))
        tallies[name] = tally
    for path in packed:
        problem = _packed(path)
        problems.append(problem)
        tallies[path.relative_to(folder).as_posix()] = Tally(set_aside=str(problem))
    if problems and (on_bad_shard == "fail" or not shards):
        raise_all(problems)
    if tars and not any(row.n for row in shards) and any(not tally.is_plain for tally in tallies.values()):
        raise BadMember("\n".join([f"{folder}: no sample in {len(tars)} tars", *table(tallies)[1:]]))
    meta = {"made_by": "index_folder"} | (
        {"set_aside": {n: t.set_aside for n, t in sorted(tallies.items()) if t.set_aside}} if problems else {}
    )
    try:
        known = read_manifest(folder)
    except DataError:
        known = None
    if known is not None and known.shards == tuple(shards):
        return Indexed(
            view=known, tallies=tallies
        )  # the same tars keep the same view, whoever wrote the manifest: a run on them can go on
    return Indexed(view=write_manifest(folder, shards=shards, meta=meta), tallies=tallies)


def tallies_of(view: View) -> dict[str, Tally]:
    """Of an indexed folder, as they were written; tars that were set aside too."""
    found = {row.name: read_tally(view.tar(number), accepted=row.n) for number, row in enumerate(view.shards)}
    for name, why in view.meta.get("set_aside", {}).items():
        found[name] = replace(read_tally(view.folder / name, accepted=0), accepted=0, set_aside=why)
    return found


def _index(tar: Path, *, again: bool) -> tuple[Index, Tally, DataError | None]:
    """A tar's index of whole samples, what else there is, and what is wrong with it."""
    index = None if again else _kept_index(tar)
    if index is not None:
        tally = read_tally(tar, accepted=len(index))
        words = f"shard {tar.name}: {'; '.join(tally.damage)}; {tally.accepted} whole samples"
        return index, tally, CorruptShard(words) if tally.damage else None
    scanned = scan(tar)
    tally = Tally.of(scanned.found)
    write_tally(tally, tar)  # first: a fresh index says that there is no more to know
    write_index(scanned.index, index_path(tar))
    return scanned.index, tally, _damage(tar, scanned.found)


def _damage(tar: Path, found: Gathered) -> DataError | None:
    try:
        refuse_damage(tar, found)
    except DataError as error:
        return error
    return None


def _kept_index(tar: Path) -> Index | None:
    """An index that is newer than any change of the tar, also one that kept its time of modification."""
    try:
        index = load_index(index_path(tar))
        status = tar.stat()
        fresh = index_path(tar).stat().st_mtime_ns >= max(status.st_mtime_ns, status.st_ctime_ns)
    except (DataError, OSError):
        return None
    return index if fresh and index.tar_bytes == status.st_size else None


def _packed(path: Path) -> DataError:
    command = next((c for what, c in COMPRESSED.values() if path.name.endswith(_ENDINGS[what])), "unpack")
    plain = path.with_name(f"{path.name.partition('.')[0]}.tar")
    rule = f"samples of a compressed tar cannot be read where they lie; unpack it: {command} {path} > {plain}"
    return CorruptShard(f"{path.name} is compressed: {rule}")


_ENDINGS = {"gzip": ("gz", "tgz"), "zstd": ("zst",), "bzip2": ("bz2",), "xz": ("xz",)}


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)

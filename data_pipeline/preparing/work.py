"""The unit of preparation: one output file, made from a list of inputs that never depends on who makes it.

`x.tar.part-*` -> fsync -> rename to `x.tar` -> `x.idx` -> `x.done.json`. A file whose done record names the same parameters
and inputs is finished; anything else is made again from the start, so a kill at any moment costs one shard a worker, and
two workers on one shard write the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from data_pipeline.commit import commit, temporary_sibling, write_committed
from data_pipeline.errors import BadMember, MissingShard, WrongView
from data_pipeline.index import Index, index_bytes, index_path, refuse_damage, scan, write_index
from data_pipeline.manifest import Shard, describe

CODE = 1
"""Of everything that decides bytes; higher when equal inputs and parameters would give others."""
EXAMPLES = 5
"""Rejected samples that a record names, of each reason."""

Service = Callable[[Any], "Promise"]
"""What makes something costly of a batch (encoders), here or somewhere else."""


class Promise(Protocol):
    """An answer that is on its way."""

    def result(self) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class Input:
    """A file that a task reads; `name` is relative to the source, so that a source may be moved."""

    path: Path
    name: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Task:
    """One output file."""

    number: int
    output: Path
    inputs: tuple[Input, ...]
    piece: Any = None
    """What the work itself needs to know."""

    @property
    def done(self) -> Path:
        return self.output.with_name(f"{self.output.name.partition('.')[0]}.done.json")


@dataclass(kw_only=True)
class Count:
    """What became of the samples of one task: taken = kept + the sum of rejected."""

    taken: int = 0
    kept: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    damage: list[str] = field(default_factory=list)
    sums: dict[str, str] = field(default_factory=dict)
    """sha256 of inputs that were read anyway, by name"""

    def reject(self, reason: str, *, words: str = "", count: int = 1) -> None:
        self.taken += count
        self.rejected[reason] += count
        if words and len(named := self.examples.setdefault(reason, [])) < EXAMPLES:
            named.append(words[:300])

    def keep(self) -> None:
        self.taken += 1
        self.kept += 1


@dataclass(frozen=True, kw_only=True)
class Record:
    """A done record: what was made of what. `shard` is its row of the manifest, where the output is a tar."""

    inputs: tuple[Mapping[str, Any], ...]
    params_sha256: str
    code: int
    taken: int
    kept: int
    rejected: Mapping[str, int]
    examples: Mapping[str, Sequence[str]]
    damage: Sequence[str]
    sha256: str
    bytes: int
    shard: Shard | None = None


class Work(Protocol):
    """What is made; it travels to other processes, so it can be pickled."""

    @property
    def params(self) -> Mapping[str, Any]:
        """JSON-able; everything besides the inputs that decides the bytes. Empty: nothing counts as finished."""
        ...

    @property
    def service(self) -> Callable[[int], Callable[[Any], Any]] | None:
        """Builds what `make` is given as its service, in the process where it runs; told the number of that process."""
        ...

    def tasks(self) -> Sequence[Task]: ...

    def make(self, task: Task, *, out: Path, service: Service | None) -> Count:
        """Write `out`, the output's temporary name."""
        ...


def digest(params: Mapping[str, Any]) -> str:
    """Names a set of parameters; empty for none."""
    if not params:
        return ""
    return hashlib.sha256(json.dumps({"code": CODE, **params}, sort_keys=True).encode()).hexdigest()


def run_task(work: Work, task: Task, *, service: Service | None = None) -> Record:
    """Make a task's output, or find it finished.

    Raises:
        WrongView: it is finished, but of inputs that have changed since.
        BadMember: a sample was written that no reader would take.
    """
    params_sha256 = digest(work.params)
    known = finished(task, params_sha256=params_sha256)
    if known is not None:
        return known
    task.output.parent.mkdir(parents=True, exist_ok=True)
    part = temporary_sibling(task.output)
    index = None
    try:
        count = work.make(task, out=part, service=service)
        assert count.taken == count.kept + count.rejected.total(), f"{task.output.name}: {count}"
        if task.output.suffix == ".tar":
            index = _index(part, shard=task.output.name, kept=count.kept)
        sha256, size = index.tar_sha256 if index is not None else file_sha256(part), part.stat().st_size
        commit(part, task.output)
    except (FileNotFoundError, MissingShard):
        known = finished(task, params_sha256=params_sha256)
        if known is None:
            raise
        return known  # another process was first, and swept up
    finally:
        part.unlink(missing_ok=True)
    if index is not None:
        write_index(index, index_path(task.output))
    record = Record(
        inputs=tuple(
            {"name": one.name, "bytes": one.bytes, "sha256": count.sums.get(one.name) or file_sha256(one.path)}
            for one in task.inputs
        ),
        params_sha256=params_sha256, code=CODE, taken=count.taken, kept=count.kept,
        rejected=dict(sorted(count.rejected.items())), examples=count.examples, damage=count.damage,
        sha256=sha256, bytes=size, shard=None if index is None else describe(task.output, index=index),
    )  # fmt: skip
    write_committed((json.dumps(asdict(record), sort_keys=True) + "\n").encode(), task.done)
    return record


def finished(task: Task, *, params_sha256: str) -> Record | None:
    """The record of an output that is whole and was made with the same parameters.

    Raises WrongView where its inputs have changed since.
    """
    if not params_sha256:
        return None
    try:
        record = read_record(task.done)
        whole = task.output.stat().st_size == record.bytes
        if record.shard is not None:
            sizes = index_bytes(record.shard.n, fields=record.shard.fields)
            whole = whole and index_path(task.output).stat().st_size in sizes
        since = task.done.stat().st_mtime_ns
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not whole or record.params_sha256 != params_sha256 or record.code != CODE:
        return None
    _refuse_changed(task, record=record, since=since)
    return record


def read_record(path: Path) -> Record:
    """Raises OSError, ValueError, KeyError or TypeError for anything else."""
    raw = json.loads(path.read_bytes())
    shard = raw["shard"]
    if shard is not None:
        shard = Shard(**{**shard, "fields": tuple(shard["fields"])})
    return Record(**{**raw, "inputs": tuple(raw["inputs"]), "shard": shard})


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _refuse_changed(task: Task, *, record: Record, since: int) -> None:
    """Times say which inputs may have changed, sums whether they have: a copied source is the same one."""
    was = {one["name"]: one for one in record.inputs}
    if was.keys() != {one.name for one in task.inputs}:
        raise WrongView(f"{task.output.name} was made of {sorted(was)[:3]}..., and is to be made of other inputs now")
    for one in task.inputs:
        status = one.path.stat()
        changed = status.st_size != was[one.name]["bytes"]
        if not changed and max(status.st_mtime_ns, status.st_ctime_ns) >= since:
            changed = file_sha256(one.path) != was[one.name]["sha256"]
        if changed:
            raise WrongView(
                f"{one.name}: its content has changed since {task.output.name} was made of it; "
                f"restore it, or write to another folder"
            )


def _index(part: Path, *, shard: str, kept: int) -> Index:
    """Raises BadMember where a sample that was written would not be read."""
    scanned = scan(part, promises=False)
    refuse_damage(part, scanned.found)
    if scanned.found.rejected or len(scanned.index) != kept:
        why = ", ".join(f"{count} {why}" for why, count in scanned.found.rejected.items())
        raise BadMember(f"shard {shard}: {why}; keys must differ, and the members of a sample stand side by side")
    return scanned.index

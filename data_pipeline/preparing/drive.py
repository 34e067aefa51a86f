"""From a piece of work to a finished folder: the plan, the tasks by some runner, the manifest.

`plan.json` is written first: the parameters and the names and sizes of all inputs. A folder whose plan says something else
is refused with what is different. The manifest is written last, by whoever finds every task finished.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from data_pipeline.commit import write_committed
from data_pipeline.errors import DataError, WrongView
from data_pipeline.manifest import MANIFEST, Shard, View, read_manifest, write_manifest
from data_pipeline.parts import Part
from data_pipeline.preparing.claims import Claims
from data_pipeline.preparing.local import Local, Runner
from data_pipeline.preparing.work import Record, Task, Work, digest, finished

PLAN = "plan.json"
SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Done:
    """Of all tasks that are finished."""

    records: tuple[Record, ...]
    """In the order of the tasks."""
    of: int
    """tasks in all"""

    @property
    def complete(self) -> bool:
        return len(self.records) == self.of

    @property
    def taken(self) -> int:
        return sum(record.taken for record in self.records)

    @property
    def kept(self) -> int:
        return sum(record.kept for record in self.records)

    @property
    def rejected(self) -> Counter[str]:
        total: Counter[str] = Counter()
        for record in self.records:
            total.update(record.rejected)
        return total

    def damage_words(self) -> list[str]:
        """Of inputs that are damaged."""
        return [words for record in self.records for words in record.damage]

    def lines(self) -> list[str]:
        """For people."""
        lines = [
            f"taken        {self.taken:>12,} samples",
            f"kept         {self.kept:>12,} samples in {len(self.records):,} shards",
        ]
        for why, count in self.rejected.most_common():
            example = next((e for r in self.records for e in r.examples.get(why, ())), "")
            lines.append(f"rejected     {count:>12,} samples: {why}{f' ({example})' if example else ''}")
        lines += [f"damaged      {words}" for words in self.damage_words()]
        return lines


class Watcher:
    """Sees each finished task; this one looks away."""

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, *_: object) -> None: ...

    def finished(self, record: Record, *, fresh: bool) -> None: ...


Watch = Callable[[int], Watcher]
"""Given the number of tasks, what sees them finish."""


def run(
    work: Work, folder: Path, *, runner: Runner | None = None, part: Part | None = None,
    watch: Watch | None = None, plan: bool = True, steal: bool = True,
) -> Done:  # fmt: skip
    """Make all of a work's tasks that are not finished; of a part its own, then those of others that no process is at.

    Args:
        watch: sees tasks finish.
        plan: whether the folder has a plan. Without, whoever calls holds the folder to one set of parameters.
        steal: whether a part does what other parts have left. Without, a part does its own only.

    Raises:
        WrongView: the folder holds something made with other parameters or inputs.
    """
    tasks, params_sha256 = work.tasks(), digest(work.params)
    folder.mkdir(parents=True, exist_ok=True)
    if plan:
        _hold_plan(folder, params=work.params, tasks=tasks)
    runner = runner or Local()
    records: dict[int, Record] = {}
    with (watch or (lambda _: Watcher()))(len(tasks)) as watcher:
        for task in tasks:
            if (record := finished(task, params_sha256=params_sha256)) is not None:
                records[task.number] = record
                watcher.finished(record, fresh=False)
        missing = [task for task in tasks if task.number not in records]
        for task, record in _run(
            work, missing, mine=None if part is None else part.mine(tasks), runner=runner, steal=steal
        ):
            records[task.number] = record
            watcher.finished(record, fresh=True)
    for task in missing:  # those that others have finished meanwhile
        if task.number not in records and (record := finished(task, params_sha256=params_sha256)) is not None:
            records[task.number] = record
    if len(records) == len(tasks):
        _sweep(folder, tasks, alone=part is None)
    return Done(records=tuple(record for _, record in sorted(records.items())), of=len(tasks))


def seal(done: Done, folder: Path, *, meta: Mapping[str, Any]) -> View | None:
    """Write the manifest of a folder whose tasks are all finished, else return None. One that is there and says the same stays.

    Raises DataError where not one sample was kept.
    """
    if not done.complete:
        return None
    if not done.kept:
        raise DataError("\n".join([f"{folder}: no sample was kept", *done.lines()]))
    shards: Sequence[Shard] = [record.shard for record in done.records if record.shard is not None]
    plain = json.loads(json.dumps(meta))
    if (folder / MANIFEST).exists():
        there = read_manifest(folder)
        if tuple(there.shards) == tuple(shards) and dict(there.meta) == plain:
            return there
    return write_manifest(folder, shards=shards, meta=plain)


def _run(
    work: Work, missing: Sequence[Task], *, mine: Sequence[Task] | None, runner: Runner, steal: bool
) -> Iterator[tuple[Task, Record]]:
    if mine is None:
        yield from runner.run(work, missing)
        return
    own = {task.number for task in mine}
    first = [task for task in missing if task.number in own]
    # Others from the end: their own parts come from the front, so the two seldom meet.
    rest = [task for task in reversed(missing) if task.number not in own]
    claims = Claims()
    try:
        queue: Iterable[Task] = chain(claims.take(first), claims.take(rest) if steal else ())
        for task, record in runner.run(work, queue):
            claims.release(task)
            yield task, record
    finally:
        claims.close()


def _hold_plan(folder: Path, *, params: Mapping[str, Any], tasks: Sequence[Task]) -> None:
    inputs = {one.name: one.bytes for task in tasks for one in task.inputs}
    plan = {"params": json.loads(json.dumps(params)), "inputs": inputs}
    path = folder / PLAN
    try:
        there = json.loads(path.read_bytes())
        told, was = there["params"], there["inputs"]
    except (OSError, ValueError, KeyError, TypeError):
        if (folder / MANIFEST).exists():
            raise WrongView(
                f"{folder} holds another data set ({MANIFEST} without {PLAN}); choose another folder"
            ) from None
        write_committed((json.dumps(plan, indent=0, sort_keys=True) + "\n").encode(), path)
        return
    different = [
        f"{k}: there {told.get(k)!r}, asked {plan['params'].get(k)!r}"
        for k in sorted({*told, *plan["params"]}) if told.get(k) != plan["params"].get(k)
    ]  # fmt: skip
    if different:
        raise WrongView(f"{folder} holds another data set ({'; '.join(different)}); choose another folder or remove it")
    changes = {
        "added": sorted(inputs.keys() - was.keys()),
        "removed": sorted(was.keys() - inputs.keys()),
        "of another size": sorted(name for name in inputs.keys() & was.keys() if inputs[name] != was[name]),
    }
    if any(changes.values()):
        words = "; ".join(f"{len(names)} {what} ({_few(names)})" for what, names in changes.items() if names)
        raise WrongView(
            f"{folder}: its inputs have changed since it was begun: {words}; restore them or choose another folder"
        )


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _sweep(folder: Path, tasks: Sequence[Task], *, alone: bool) -> None:
    """What killed processes left: nobody needs it when all is finished. The plan and the manifest may just be
    written by another part."""
    for where in {folder, *(task.output.parent for task in tasks)}:
        for pattern in ("*.part-*", "*.claim"):
            for left in where.glob(pattern):
                if alone or not left.name.startswith((PLAN, MANIFEST)):
                    left.unlink(missing_ok=True)

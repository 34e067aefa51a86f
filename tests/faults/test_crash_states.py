"""Every state that a loss of power may leave, at every call of a save, a prune, a set-aside and a resume, in worlds of 1, 2 and 4.

Held in each: what was committed before is still there, what is found under a committed name is whole, the newest of it
loads, no tensor mixes two steps, and a new save goes through. `make test-faults` looks at more than 20,000 states, the
default run at a seeded part.
"""

from __future__ import annotations

import copy
import itertools
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from disk_model import Disk, Op, Recorder, digest, write_tree

from ecdit_train import checkpoint
from ecdit_train.checkpoint import CheckpointManager, Placed, files, store
from ecdit_train.checkpoint.background import SaverLostError
from ecdit_train.errors import CheckpointError
from ecdit_train.parallel.placement import ParamPlacement

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "checkpoint"))
from checkpoint_worlds import ok, run_world

ROWS = 8


def tensors_of(step, rank=0, world=1):
    """Every element says its step, so a mixture would show; `copy` is on all ranks."""
    part = torch.full((ROWS // world, 3), float(step))
    place = ParamPlacement(global_shape=(ROWS, 3), index=rank, count=world)
    return {"w": Placed(tensor=part, placement=place), "copy": torch.full((5,), step), "n": torch.tensor(step)}


def save(manager, step):
    comm = manager.comm
    manager.save(step, tensors=tensors_of(step, comm.rank, comm.world), objects={"step": step})


class NearSaver:
    """Does a saver's work in a thread of this process, where the recorder sees it; loses the first part if asked to."""

    def __init__(self, *, loses: bool) -> None:
        self.loses = loses

    def start(self, part, views):
        self.copies = [bytes(store.as_bytes(view)) for view in views]
        self.again(part)

    def copied(self):
        pass

    def again(self, part):
        self.pool = ThreadPoolExecutor(1)
        self.future = self.pool.submit(store.write, part, read=lambda n: memoryview(self.copies[n]))

    @property
    def busy(self):
        return not self.future.done()

    def report(self):
        report = self.future.result()
        self.pool.shutdown()
        if self.loses:
            self.loses = False
            raise SaverLostError("it died before it answered")
        return report

    def close(self):
        pass


def beside(manager, step, *, loses=False):
    """A save in the background, with other tensors by the time it is written."""
    manager.saver, comm = NearSaver(loses=loses and manager.comm.rank == 0), manager.comm
    tensors = tensors_of(step, comm.rank, comm.world)
    manager.begin(step, tensors=tensors, objects={"step": step})
    manager.copied()
    for value in tensors.values():
        (value.tensor if isinstance(value, Placed) else value).fill_(99)
    assert manager.settle().step == step


def managers(root, world, work, **options):
    """`work(manager)` on every rank of a world."""
    if world == 1:
        return work(CheckpointManager(root, **options))
    ok(run_world(world, lambda comm: work(CheckpointManager(root, comm=comm, **options))))


def resumed(root):
    targets = {"w": torch.zeros(ROWS, 3), "copy": torch.zeros(5, dtype=torch.int64), "n": torch.tensor(0)}
    found = CheckpointManager(root).resume(targets)
    if found is not None:
        for value in targets.values():
            assert (value == found.step).all(), "a mixture of steps"
        assert found.objects["step"] == found.step
    return found


def damage(root, step):
    for path in (root / f"step_{step:08d}").iterdir():
        if path.name.startswith("rank_"):
            path.write_bytes(b"")


SCENARIOS: dict[str, tuple[list[int], Callable, int]] = {
    # steps committed before, what is done, the step that must survive whatever happens
    "first save": ([], lambda m: save(m, 1), 0),
    "second save": ([1], lambda m: save(m, 2), 1),
    "two saves, pruned to one": ([1], lambda m: (save(m, 2), save(m, 3)), 1),
    "final save over leftovers": ([1, 2], lambda m: save(m, 4), 2),
    "in the background": ([1], lambda m: (beside(m, 2), beside(m, 3)), 1),
    "a saver lost": ([1], lambda m: beside(m, 2, loses=True), 1),
    "prune of many": ([1, 2, 3, 4], lambda m: save(m, 5), 4),
}


def trace(root: Path, *, world: int, scenario: str) -> tuple[Disk, list[Op], int]:
    """The folder before, and the calls made in it."""
    before, act, floor = SCENARIOS[scenario]
    root.mkdir()
    for step in before:
        managers(root, 1, lambda m, step=step: save(m, step), keep=9)
    if scenario == "final save over leftovers":
        shutil.copytree(root / "step_00000001", root / "step_00000004.tmp-0badc0de")
    disk = Disk(root)
    with Recorder(root) as recorder:
        managers(root, world, act, keep=1)
    assert len(recorder.ops) >= 10
    return disk, recorder.ops, floor


def check(tree, root: Path, *, floor: int, go_on: bool) -> None:
    write_tree(tree, root)
    before = [
        checkpoint.verify(committed.path).step for committed in checkpoint.find(root)
    ]  # whole, the older ones too
    found = resumed(root)
    assert (found.step if found else 0) >= floor, "a committed step is gone"
    assert (found.step if found else None) == (max(before) if before else None)
    assert not found or not found.rejected, "a committed name on something that is not whole"
    if go_on:
        managers(root, 1, lambda m: save(m, 50), keep=1)
        assert [c.step for c in checkpoint.find(root)] == [50]
        assert not [name for name in os.listdir(root) if ".tmp-" in name or ".trash-" in name]


def sweep(folder: Path, *, world: int, scenario: str, most: int, seed: int) -> int:
    """Looks at every prefix of the calls with up to `most` states each; returns how many different states there were."""
    disk, ops, floor = trace(folder / "run", world=world, scenario=scenario)
    rng, seen = random.Random(seed), set[bytes]()
    for number in range(len(ops) + 1):
        if number:
            disk.do(ops[number - 1])
        for tree in disk.crashes(most=most, rng=rng):
            if (key := digest(tree)) in seen:
                continue
            seen.add(key)
            state = folder / "state"
            check(tree, state, floor=floor, go_on=len(seen) % 7 == 0)
            shutil.rmtree(state)
    return len(seen)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_no_crash_state_loses_mixes_or_invents_a_step(tmp_path, scenario, world):
    assert sweep(tmp_path, world=world, scenario=scenario, most=4, seed=world) >= 15


def folder_in_memory() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)


@pytest.mark.faults
def test_twenty_thousand_crash_states(record_property):
    states = 0
    for world, scenario in itertools.product((1, 2, 4), SCENARIOS):
        with folder_in_memory() as folder:
            states += sweep(Path(folder), world=world, scenario=scenario, most=1500, seed=10 + world)
    assert states >= 20_000
    record_property("crash states", states)


def without(ops: list[Op], number: int) -> list[Op]:
    """The calls of a program that forgets one of its fsyncs."""
    syncs = [n for n, op in enumerate(ops) if op.kind == "fsync"]
    return [op for n, op in enumerate(ops) if n != syncs[number]]


def test_a_save_that_forgets_one_sync_is_caught(tmp_path, monkeypatch):
    """The negative control, for each sync of a save of one rank: its data, their checksums, the manifest, its folder
    and the folder above."""
    monkeypatch.setattr(files, "PATIENCE", ())  # what is missing here does not come back
    disk, ops, floor = trace(tmp_path / "run", world=1, scenario="second save")
    syncs = sum(op.kind == "fsync" for op in ops)
    assert syncs >= 5
    for number in range(syncs):
        assert caught(copy.deepcopy(disk), without(ops, number), tmp_path / "state", floor=floor), (
            f"sync {number} of {syncs}"
        )


def caught(disk: Disk, ops: list[Op], state: Path, *, floor: int) -> bool:
    """Whether some crash state of these calls breaks a promise."""
    for op in ops:
        disk.do(op)
        for tree in disk.crashes(most=64, rng=random.Random(0)):
            try:
                # The rename that nothing made durable may be taken back at the very end; whoever was told of it has lost it.
                check(tree, state, floor=2 if op is ops[-1] else floor, go_on=False)
            except (AssertionError, CheckpointError):
                return True
            finally:
                shutil.rmtree(state)
    return False

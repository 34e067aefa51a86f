"""Saving beside the training: the bytes are those of the moment of the copy; whatever becomes of the saver, a step is whole
or is not there."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from checkpoint_worlds import Mesh, ok, reference, run_world, same, shards

from ecdit_train import checkpoint
from ecdit_train.checkpoint import CheckpointManager, background
from ecdit_train.checkpoint.background import Saver
from ecdit_train.checkpoint.failures import CheckpointStorageError
from ecdit_train.errors import CheckpointError


@pytest.fixture
def savers():
    made: list[Saver] = []

    def make(patience=60.0):
        made.append(Saver(patience=patience))
        return made[-1]

    yield make
    for saver in made:
        saver.close()


def large(value):
    """Enough bytes that a saver is still at work when the next line of a test runs."""
    return {"w": torch.full((48, 1 << 20), float(value)), "rows": torch.arange(12.0).reshape(3, 4).t()}


def loaded(root):
    targets = {"w": torch.zeros(48, 1 << 20), "rows": torch.zeros(4, 3)}
    step = CheckpointManager(root).resume(targets).step
    assert torch.equal(targets["rows"], large(0)["rows"])
    assert (targets["w"] == targets["w"][0, 0]).all()
    return step, targets["w"][0, 0].item()


def test_what_is_committed_is_what_was_there_when_it_was_asked_for(tmp_path, savers):
    manager = CheckpointManager(tmp_path, saver=savers())
    tensors = large(1)
    assert manager.begin(7, tensors=tensors, objects={"a": 1}) is None
    assert manager.in_flight == 7
    assert checkpoint.find(tmp_path) == [], "not committed before `settle` says so"
    manager.copied()
    tensors["w"].fill_(99)
    done = manager.settle()
    assert (done.step, done.told, manager.in_flight) == (7, (), None)
    assert loaded(tmp_path) == (7, 1.0)
    assert manager.settle() is None


def test_a_slow_copy_is_waited_for_where_tensors_are_about_to_change(tmp_path, savers, monkeypatch):
    put = background.Memory.put

    def slow(memory, *args):
        time.sleep(0.5)
        put(memory, *args)

    monkeypatch.setattr(background.Memory, "put", slow)
    manager = CheckpointManager(tmp_path, saver=savers())
    manager.copied()  # of nothing
    tensors = large(1)
    manager.begin(1, tensors=tensors, objects={})
    assert manager.writing
    manager.copied()
    tensors["w"].fill_(99)
    assert manager.settle().blocked >= 0.3
    assert loaded(tmp_path) == (1, 1.0)

    tensors = large(2)
    manager.begin(2, tensors=tensors, objects={})
    assert manager.settle().step == 2  # which waits for the copy itself
    assert loaded(tmp_path) == (2, 2.0)
    manager.begin(3, tensors=tensors, objects={})
    manager.close()  # in the middle of it


def test_a_copy_that_fails_is_said_by_the_commit(tmp_path, savers, monkeypatch):
    manager = CheckpointManager(tmp_path, saver=savers())
    with monkeypatch.context() as broken:
        broken.setattr(background.Memory, "put", lambda *args, **more: 1 / 0)
        manager.begin(1, tensors=large(1), objects={})
        manager.copied()
    with pytest.raises(CheckpointError, match="RuntimeError: ZeroDivisionError"):
        manager.settle()
    assert checkpoint.find(tmp_path) == []
    manager.begin(1, tensors=large(1), objects={})
    assert manager.settle().step == 1


def test_every_layout_is_written_beside_the_training_as_it_is_while_it_waits(tmp_path, savers):
    mesh, tensors = Mesh(2, 2, 2, 2), reference()

    def life(comm):
        manager = CheckpointManager(tmp_path / "beside", comm=comm, saver=savers())
        for step in (1, 2):
            values = shards(tensors, mesh=mesh, rank=comm.rank)
            manager.begin(step, tensors=values, objects={"step": step})
            manager.copied()
            for value in values.values():
                for piece in value.pieces:
                    piece.view.zero_()
            manager.settle()
        values = shards(tensors, mesh=mesh, rank=comm.rank)
        CheckpointManager(tmp_path / "waiting", comm=comm).save(2, tensors=values, objects={"step": 2})
        return manager.saver.pid

    pids = ok(run_world(mesh.world, life))
    assert len(set(pids)) == mesh.world
    for name in tensors:
        pair = [checkpoint.load_full(tmp_path / form / "step_00000002", name=name) for form in ("beside", "waiting")]
        assert same(*pair)
        assert same(pair[0], tensors[name])
    data = {
        form: sorted(p.name for p in (tmp_path / form / "step_00000002").iterdir()) for form in ("beside", "waiting")
    }
    assert data["beside"] == data["waiting"]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["dead", "stopped"])
def test_a_saver_that_is_lost_is_replaced_and_its_part_written_again(tmp_path, savers, how):
    saver = savers(patience=12.0 if how == signal.SIGSTOP else 60.0)
    manager = CheckpointManager(tmp_path, saver=saver)
    manager.begin(1, tensors=large(1), objects={})
    manager.copied()
    first = saver.pid
    os.kill(first, how)
    deadline = time.monotonic() + 60
    while manager.writing:  # as the loop asks after every step
        assert time.monotonic() < deadline
        time.sleep(0.05)
    done = manager.settle()
    words = "was ended by SIGKILL" if how == signal.SIGKILL else "took longer than 12 s (a third"
    assert len(done.told) == 1
    assert words in done.told[0]
    assert saver.pid != first
    assert not psutil.pid_exists(first)
    assert loaded(tmp_path) == (1, 1.0)
    manager.begin(2, tensors=large(2), objects={})
    assert manager.settle().told == ()
    assert loaded(tmp_path) == (2, 2.0)
    assert not [name for name in os.listdir(tmp_path) if ".tmp-" in name]


def test_what_the_disk_says_to_the_saver_is_said_on_every_rank(tmp_path, savers):
    def life(comm):
        saver = savers()
        manager = CheckpointManager(tmp_path, comm=comm, saver=saver)
        manager.begin(1, tensors={"w": torch.full((4, 5), 1.0)}, objects={})
        manager.settle()
        if comm.rank == 1:
            resource.prlimit(saver.pid, resource.RLIMIT_FSIZE, (16, 16))
        values = shards(reference(), mesh=Mesh(1, 2, 1, 1), rank=comm.rank)
        manager.begin(2, tensors=values, objects={})
        with pytest.raises(CheckpointStorageError, match=r"rank 1: OSError: .*File too large") as raised:
            manager.settle()
        assert raised.value.exit_code == 87
        manager.begin(3, tensors=values, objects={})  # by a new saver, without the limit
        return manager.settle().step

    assert ok(run_world(2, life)) == [3, 3]
    assert [c.step for c in checkpoint.find(tmp_path)] == [1, 3]
    assert not [name for name in os.listdir(tmp_path) if ".tmp-" in name]


def test_without_room_for_a_copy_training_waits_and_is_told(tmp_path, savers, monkeypatch):
    monkeypatch.setattr(background, "free_memory", lambda: 1000)
    manager = CheckpointManager(tmp_path, saver=savers())
    done = manager.begin(1, tensors=large(1), objects={})
    assert done.step == 1
    assert "was saved while training waited: rank 0: a copy for saving in the background takes" in done.told[0]
    assert manager.in_flight is None
    assert loaded(tmp_path) == (1, 1.0)


def test_the_memory_left_is_that_of_the_machine_or_less():
    assert 0 < background.free_memory() <= psutil.virtual_memory().total


TRAINER = """
import sys, time, torch
from ecdit_train.checkpoint import CheckpointManager
from ecdit_train.checkpoint.background import Saver
manager = CheckpointManager(sys.argv[1], saver=Saver(patience=60))
manager.begin(1, tensors={"w": torch.ones(64, 1 << 20)}, objects={})
manager.copied()
print(manager.saver.pid, flush=True)
time.sleep(60)
"""


def test_a_saver_does_not_outlive_its_trainer_nor_obeys_the_jobs_signals(tmp_path):
    trainer = subprocess.Popen([sys.executable, "-c", TRAINER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    saver = psutil.Process(int(trainer.stdout.readline()))
    for _ in range(100):  # until it is up, it cannot have set its signals
        if any(".tmp-" in name and list((tmp_path / name).iterdir()) for name in os.listdir(tmp_path)):
            break
        time.sleep(0.1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        saver.send_signal(number)
    time.sleep(0.1)
    assert saver.is_running()
    trainer.kill()
    trainer.wait()
    assert not psutil.wait_procs([saver], timeout=15)[1]
    assert checkpoint.find(tmp_path) == []

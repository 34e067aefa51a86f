"""When a run saves and what a disk that fails does to it: nothing, as long as that is safe."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import time
from types import SimpleNamespace

import pytest
from tiny_runs import assert_same, configure, live, records, steady

from ecdit_train import checkpoint
from ecdit_train.checkpoint import background, manifest, restore, store
from ecdit_train.errors import StorageError
from ecdit_train.run_folder import CHECKPOINTS
from ecdit_train.train import saving


def steps_of(run):
    return [committed.step for committed in checkpoint.find(run / CHECKPOINTS)]


def test_saving_beside_the_training_changes_nothing_but_who_writes(tiny_shards, tmp_path):
    lives = {
        how: live(configure(tmp_path / how, tiny_shards, f"checkpoint.save={how}", "checkpoint.keep=9"))
        for how in ("background", "blocking")
    }
    assert_same(lives["background"].tensors, lives["blocking"].tensors)
    assert steady(records(tmp_path / "background")) == steady(records(tmp_path / "blocking"))
    assert steps_of(tmp_path / "background") == steps_of(tmp_path / "blocking") == [4, 8, 12]
    for step in (4, 8, 12):
        pair = [tmp_path / how / CHECKPOINTS / f"step_{step:08d}" for how in lives]
        a, b = (restore.read_objects(path) for path in pair)
        assert a.pop("config")["checkpoint"]["save"] == "background"
        assert b.pop("config")["checkpoint"]["save"] == "blocking"
        assert a == b
        for name in checkpoint.verify(pair[0]).tensors:
            assert (checkpoint.load_full(pair[0], name=name) == checkpoint.load_full(pair[1], name=name)).all()


def test_an_update_waits_for_a_slow_copy(tiny_shards, tmp_path, monkeypatch):
    """What is committed is the state of its step, also where the copy is still being made when the next update is ready."""
    put = background.Memory.put

    def slow(*args):
        time.sleep(0.4)
        put(*args)

    monkeypatch.setattr(background.Memory, "put", slow)
    for how in ("background", "blocking"):
        live(configure(tmp_path / how, tiny_shards, f"checkpoint.save={how}", "checkpoint.keep=9"))
    for step in (4, 8):  # the last one always waits
        pair = [tmp_path / how / CHECKPOINTS / f"step_{step:08d}" for how in ("background", "blocking")]
        for name in checkpoint.verify(pair[0]).tensors:
            assert (checkpoint.load_full(pair[0], name=name) == checkpoint.load_full(pair[1], name=name)).all(), name


def test_the_last_save_of_a_stop_is_committed_when_the_run_returns(tiny_shards, tmp_path):
    config = configure(tmp_path, tiny_shards, "checkpoint.save=background", "checkpoint.every_steps=3")
    assert not live(config, stop_after=6).finished  # asked for beside the training and as the last: once
    assert steps_of(tmp_path) == [3, 6]
    assert live(config).finished


class FullDisk:
    """Refuses the writes of some saves, as a disk does."""

    def __init__(self, monkeypatch, *, refuses):
        self.calls, self.refuses, self.real = 0, refuses, store.write
        monkeypatch.setattr(store, "write", self)

    def __call__(self, part, *, read):
        self.calls += 1
        if self.refuses(self.calls):
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.real(part, read=read)


def test_training_goes_on_over_a_full_disk_and_says_so(tiny_shards, tmp_path, monkeypatch, capsys):
    FullDisk(monkeypatch, refuses=lambda call: call in (1, 2))
    life = live(configure(tmp_path, tiny_shards, "checkpoint.every_steps=3", "checkpoint.keep=9"))
    assert life.finished
    assert steps_of(tmp_path) == [9, 12]
    said = capsys.readouterr().out
    assert "step 3 was not saved, training goes on (1 of 3 in a row)" in said
    assert "step 6 was not saved, training goes on (2 of 3 in a row)" in said
    assert "No space left on device" in said
    assert {line["step"]: line["ckpt/failed"] for line in records(tmp_path) if "ckpt/failed" in line} == {
        4: 1,
        7: 2,
        10: 0,
    }
    assert not [name for name in os.listdir(tmp_path / CHECKPOINTS) if ".tmp-" in name]


def test_a_disk_that_stays_full_ends_the_run_and_names_what_is_safe(tiny_shards, tmp_path, monkeypatch):
    FullDisk(monkeypatch, refuses=lambda call: call > 1)
    with pytest.raises(
        StorageError, match=r"step 10 could not be saved \(4 in a row\); newest committed step: 2: .*No space"
    ) as e:
        live(configure(tmp_path, tiny_shards, "checkpoint.every_steps=2"))
    assert e.value.exit_code == 87
    assert steps_of(tmp_path) == [2]


def test_a_last_save_that_fails_is_not_passed_over(tiny_shards, tmp_path, monkeypatch):
    FullDisk(monkeypatch, refuses=lambda call: True)
    with pytest.raises(
        StorageError, match=r"step 5 could not be saved \(1 in a row\); newest committed step: none of this life"
    ):
        live(configure(tmp_path, tiny_shards, "checkpoint.every_steps=100"), stop_after=5)


def test_youngs_interval():
    assert saving.interval(2.0, step_s=1.0, hours_between_failures=49.5) == round(math.sqrt(2 * 2 * 49.5 * 3600))
    assert saving.interval(1e-6, step_s=9.0, hours_between_failures=0.001) == 1


def test_the_interval_follows_from_what_a_save_costs(tiny_shards, tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "FIRST", 2)
    words = (
        "checkpoint.every_steps=null",
        "checkpoint.hours_between_failures=1e-7",
        "checkpoint.keep=99",
        "train.steps=20",
    )
    live(configure(tmp_path, tiny_shards, *words))
    derived = [int(line["ckpt/interval"]) for line in records(tmp_path) if "ckpt/interval" in line]
    saved = steps_of(tmp_path)
    assert saved[0] == 2
    assert saved[-1] == 20
    gaps = [after - before for before, after in itertools.pairwise(saved)]
    assert gaps[:-1] == derived[: len(gaps) - 1]
    assert gaps[-1] <= derived[len(gaps) - 1]


def test_a_checkpoint_says_what_made_it(tiny_shards, tmp_path):
    live(configure(tmp_path, tiny_shards, "train.steps=4"))
    made = manifest.read(checkpoint.newest(tmp_path / CHECKPOINTS)).lineage
    assert made["attempt"] >= 1
    assert made["libraries"]["torch"]
    assert json.loads(json.dumps(made)) == made
    assert made["git"] is None or len(made["git"]["commit"]) == 40


def test_the_age_of_the_newest_commit_is_what_would_be_lost(monkeypatch, tiny_shards, tmp_path):
    """It grows with the clock, and falls to the time since the save was asked for once that is committed."""
    now = 1000.0
    monkeypatch.setattr(saving, "time", SimpleNamespace(monotonic=lambda: now))
    done = SimpleNamespace(step=4, blocked=0.1, seconds=2.0, told=())
    manager = SimpleNamespace(in_flight=None, saver=None, save=lambda *a, **k: done)
    config = configure(tmp_path, tiny_shards).checkpoint
    saves = saving.Saves(manager, config, runtime=None, say=print)
    now = 1010.0
    saves.start(0, committed=False)
    now = 1050.0
    assert saves.record()["ckpt/age_s"] == 40.0
    saves.save(4, tensors=dict, objects=dict, lineage={}, last=False)
    now = 1057.0
    record = saves.record()
    assert (record["ckpt/step"], record["ckpt/age_s"]) == (4, 7.0)

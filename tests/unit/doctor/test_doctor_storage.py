"""What `ecdit doctor` asks of a run folder's file system, with file systems that do not keep their promises."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ecdit_train import atomic
from ecdit_train.doctor import storage

TABLE = """22 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw
30 22 0:40 / /home rw,relatime - nfs4 server:/home rw,vers=4.2,hard
31 22 0:41 / /soft rw,relatime - nfs server:/soft rw,vers=3,soft
32 22 0:42 / /scratch rw,relatime - lustre mds:/scratch rw,flock
33 22 0:43 / /cloud rw,relatime - fuse.s3fs s3fs rw
34 22 0:44 / /old ro,relatime - xfs /dev/sdb1 ro
35 22 0:45 / /mem rw - tmpfs tmpfs rw
36 22 0:46 / /with\\040space rw - beegfs b rw
37 22 0:47 / /ceph rw - fuse.ceph c rw
"""


def by_name(found) -> dict:
    return {one.what: one for one in found}


def only(found):
    (one,) = list(found)
    return one


@pytest.mark.parametrize(
    ("checkpoint", "state"), [(0.0, "ok"), (1.0, "ok"), (0.47, "warning"), (0.6, "fail"), (2.0, "fail")]
)
def test_room(checkpoint, state, tmp_path, monkeypatch):
    """Of a disk with 100 GB free: a checkpoint of so many times that, and 1 is a small one."""
    monkeypatch.setattr(storage.preflight_task, "free", lambda _: int(100e9))
    size = 1e6 if checkpoint == 1.0 else 100e9 * checkpoint
    one = only(storage.room(tmp_path / "to" / "come", checkpoint_bytes=size))
    assert one.state == state
    assert str(tmp_path) in one.found


def test_room_without_a_size(tmp_path, monkeypatch):
    monkeypatch.setattr(storage.preflight_task, "free", lambda _: int(1e9))
    assert only(storage.room(tmp_path, checkpoint_bytes=0)).state == "warning"
    step = tmp_path / "checkpoints" / "step_00000004"
    step.mkdir(parents=True)
    (step / "weights").write_bytes(bytes(4_000_000))
    one = only(storage.room(tmp_path, checkpoint_bytes=0))
    assert (one.state, "250.0 checkpoints of 0.00 GB" in one.found) == ("ok", True)
    monkeypatch.setattr(storage.preflight_task, "free", lambda _: None)
    assert only(storage.room(tmp_path, checkpoint_bytes=0)).state == "fail"


@pytest.mark.parametrize(
    ("folder", "nodes", "state", "said"),
    [
        ("/data/run", 1, "ok", "/ is ext4"),
        ("/data/run", 2, "warning", "which other nodes do not see"),
        ("/home/me/run", 2, "warning", "/home is nfs4"),
        ("/homework", 1, "ok", "/ is ext4"),
        ("/soft/run", 2, "warning", "mounted soft"),
        ("/scratch/run", 8, "ok", "/scratch is lustre"),
        ("/ceph/run", 8, "ok", "fuse.ceph"),
        ("/cloud/run", 1, "warning", "fuse.s3fs"),
        ("/old/run", 1, "fail", "read-only"),
        ("/mem/run", 1, "warning", "tmpfs: memory"),
        ("/with space/run", 2, "ok", "/with space is beegfs"),
    ],
)
def test_mounts(folder, nodes, state, said, tmp_path):
    table = tmp_path / "mountinfo"
    table.write_text(TABLE)
    one = only(storage.mount(Path(folder), nodes=nodes, table=table))
    assert (one.state, said in one.found) == (state, True), one
    assert bool(one.fix) is (state != "ok")


def test_a_system_that_does_not_say(tmp_path):
    assert only(storage.mount(tmp_path, nodes=1, table=tmp_path / "none")).state == "warning"


def test_a_disk_keeps_its_promises(tmp_path):
    found = by_name(storage.promises(tmp_path))
    assert {name: one.state for name, one in found.items()} == dict.fromkeys(
        ("rename", "fsync", "visible", "clock"), "ok"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written():
    one = only(storage.promises(Path("/proc")))
    assert (one.what, one.state) == ("write", "fail")


def test_a_rename_that_copies(tmp_path, monkeypatch):
    """As some file systems over object stores: the old name stays."""

    def write(path: Path, data: bytes) -> None:
        path.write_bytes(data)
        path.with_suffix(".copy").write_bytes(data)

    monkeypatch.setattr(atomic, "write", write)
    one = by_name(storage.promises(tmp_path))["rename"]
    assert (one.state, "left others beside it" in one.found) == ("fail", True)


def test_a_folder_put_over_another_one(tmp_path, monkeypatch):
    monkeypatch.setattr(storage.os, "rename", lambda *_: None)
    one = by_name(storage.promises(tmp_path))["rename"]
    assert (one.state, "put over another one" in one.found) == ("fail", True)


def test_a_disk_that_is_slow_or_takes_a_name_twice(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(storage, "SLOW_FSYNC", 0.0)
        assert by_name(storage.promises(tmp_path))["fsync"].state == "warning"
    real = os.open
    monkeypatch.setattr(storage.os, "open", lambda path, flags, *more: real(path, flags & ~os.O_EXCL, *more))
    one = by_name(storage.promises(tmp_path))["fsync"]
    assert (one.state, "same name" in one.found) == ("fail", True)


def test_what_another_process_does_not_see(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "SEE", "import sys; sys.exit(1)")
    assert by_name(storage.promises(tmp_path))["visible"].state == "fail"


@pytest.mark.parametrize(("skew", "state"), [(-3600.0, "warning"), (3600.0, "warning"), (1.0, "ok")])
def test_a_server_with_another_clock(skew, state, tmp_path, monkeypatch):
    now = storage.time.time
    monkeypatch.setattr(storage.time, "time", lambda: now() + skew)
    one = by_name(storage.promises(tmp_path))["clock"]
    assert one.state == state
    if state == "warning":
        assert f"{-skew:+.1f}"[:4] in one.found


def test_a_disk_that_fails_in_the_middle_is_told_for_each(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic, "write", full)
    found = by_name(storage.promises(tmp_path))
    assert {name: one.state for name, one in found.items()} == {
        "rename": "fail", "fsync": "fail", "visible": "fail", "clock": "ok",
    }  # fmt: skip
    assert "No space left" in found["fsync"].found

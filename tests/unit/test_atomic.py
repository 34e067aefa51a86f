"""A file is the old one or the new one, and a failed write leaves nothing behind; lines are added and read whatever a disk does."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from ecdit_train import atomic


def test_new_folder_new_file_and_its_permissions(tmp_path: Path) -> None:
    path = tmp_path / "a" / "job.sh"
    before = os.umask(0o077)
    try:
        atomic.write(path, b"one")
        assert path.stat().st_mode & 0o777 == 0o644
        atomic.write(path, b"two", mode=0o755)
    finally:
        os.umask(before)
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"two", 0o755)
    assert os.listdir(path.parent) == ["job.sh"]


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x"
    atomic.write(path, b"old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(atomic.os, broken, fail)
    with pytest.raises(OSError, match="disk full"):
        atomic.write(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_a_reader_keeps_the_file_it_opened(tmp_path: Path) -> None:
    path = tmp_path / "x"
    atomic.write(path, b"old")
    with path.open("rb") as reader:
        atomic.write(path, b"new")
        assert reader.read() == b"old"
    assert path.read_bytes() == b"new"


def test_lines_are_added_with_the_time_and_read_in_order(tmp_path: Path) -> None:
    path = tmp_path / "lives" / "1.jsonl"
    assert atomic.read_lines(path) == []
    atomic.append_line(path, {"what": "begun", "at": Path("a")})
    atomic.append_line(path, {"time": 5, "what": "over"})
    first, second = atomic.read_lines(path)
    assert abs(first.pop("time") - time.time()) < 60
    assert (first, second) == ({"what": "begun", "at": "a"}, {"time": 5, "what": "over"})


def test_lines_that_are_no_record_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"n": 1}\n[2]\n3\n{"n": 4\n\xff\n{"n": 5}\n{"n"')
    assert atomic.read_lines(path) == [{"n": 1}, {"n": 5}]


def test_a_line_that_the_disk_refuses_raises_nothing_and_makes_no_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    atomic.append_line(tmp_path / "gone" / "lives" / "1.jsonl", {})
    assert not os.listdir(tmp_path)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    handles = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(atomic.os, "write", fail)
    atomic.append_line(tmp_path / "1.jsonl", {})
    assert len(os.listdir("/proc/self/fd")) == handles
    assert atomic.read_lines(tmp_path / "1.jsonl") == []

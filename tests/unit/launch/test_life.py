"""What lives leave on the shared file system and ask of it, how soon one passes a warning on, and its environment."""

from __future__ import annotations

import itertools
import subprocess

import pytest

from launch import preflight, reports
from launch.decide import Ending

OK = {"all": "commit=9 end=0"}


@pytest.fixture
def stage(stage, monkeypatch):
    """Whose nodes are taken for fit."""
    monkeypatch.setattr(preflight, "check", lambda *_, **__: Ending(code=0))
    return stage


def test_a_node_rank_of_the_shell_is_not_every_nodes(stage, capfd):
    stage.environ["NODE_RANK"] = "0"
    (stage.bin / "python").write_text(
        (stage.bin / "python").read_text().replace('print("node"', 'print(os.environ.get("NODE_RANK", "none"), "node"')
    )
    assert stage.supervise(OK) == 0
    assert capfd.readouterr().out.count("none node") == 2


def test_the_jobs_folder_stays_between_lives_and_goes_with_the_last(stage):
    """Nodes remember a folder that was removed for a while (NFS)."""
    folder, found = stage.run / "jobs" / "12", set()

    def look() -> None:
        if stage.lines("life"):
            found.add(folder.stat().st_ino)

    stage.clock.at_each = look
    assert stage.supervise({"all": "commit=5 end=1"}, {"all": "commit=6 end=1"}, OK) == 0
    assert len(found) == 1
    assert not folder.exists()


def test_nodes_files_are_read_now_and_then_and_a_warning_is_passed_on_at_once(stage, monkeypatch):
    clock, reads, told = stage.clock, [], []
    real_read, real_tell = reports.read, subprocess.Popen.send_signal

    def read(folder):
        reads.append(clock.time)
        return real_read(folder)

    def tell(process, number):
        told.append(clock.time)
        real_tell(process, number)

    def warn():
        if clock.time > 60.0 and not clock.warned:
            clock.warned.append("USR2")

    monkeypatch.setattr(reports, "read", read)
    monkeypatch.setattr(subprocess.Popen, "send_signal", tell)
    clock.at_each = warn
    assert stage.supervise({"all": "wait commit=7 end=75"}) == 75
    assert told[0] == pytest.approx(60.5, abs=0.5)
    while_it_ran = reads[:-1]
    assert len(while_it_ran) > 8
    assert all(later - earlier >= 5.0 for earlier, later in itertools.pairwise(while_it_ran))

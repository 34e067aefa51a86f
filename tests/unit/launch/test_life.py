"""What one life asks of the shared file system, and how soon it passes a warning on."""

from __future__ import annotations

import itertools
import subprocess

import pytest
from job_stage import Stage

from launch import preflight, reports
from launch.decide import Ending


def test_nodes_files_are_read_now_and_then_and_a_warning_is_passed_on_at_once(tmp_path, monkeypatch):
    stage = Stage(folder=tmp_path)
    monkeypatch.setenv("PATH", stage.environ["PATH"])
    monkeypatch.setattr(preflight, "check", lambda *_, **__: Ending(code=0))
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

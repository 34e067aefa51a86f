"""The GPU check runs where there is no GPU: what it would measure is code that works, and without a device it skips."""

from __future__ import annotations

import torch

from benchmarks import gpu_check


def test_skips_with_a_reason(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 0
    assert "skipped: torch sees no CUDA device" in capsys.readouterr().out


def test_every_check_runs_on_the_cpu(capsys):
    assert gpu_check.main(["--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert said.count("pass") == 3
    assert "FAIL" not in said


def test_a_wrong_layer_fails_the_check(monkeypatch):
    monkeypatch.setattr(gpu_check, "parity", lambda device: 0.5)
    assert gpu_check.main(["--device", "cpu"]) == 1

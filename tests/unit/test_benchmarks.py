"""Benchmarks are code that works: the GPU check runs where there is no GPU, those of checkpoints on something small."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import checkpoint_scale, data_paths, data_store, gpu_check


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


def test_planning_a_save_and_a_load_are_measured_on_a_few_ranks():
    costs = checkpoint_scale.planning_and_load(checkpoint_scale.Network(), checkpoint_scale.degrees(4, ep=4), [0, 3])
    assert {"planning", "save", "load"} < costs.keys()
    assert all(costs[part]["peak_mb"] > 0 for part in ("planning", "save", "load"))
    assert costs["manifest_mb"] > 0


@pytest.mark.parametrize("kind", ["jpeg", "latent", "latent_text"])
def test_paths_of_data_are_measured_on_a_few_samples(kind):
    found = data_paths.measure(kind, samples=64, rounds=1)
    assert found["ours_us"] > found["floor_us"] > 0


def test_a_store_with_latency_and_faults_is_measured_against_its_folder(capsys):
    assert data_store.main(["--shards", "4", "--samples", "64", "--rounds", "1", "--steps", "3", "--step", "0"]) in (
        0,
        1,
    )
    told = capsys.readouterr().out
    found = json.loads(told[: told.rindex("}") + 1])
    assert set(found) == {"local"} | {
        f"{what}, {how}" for what in ("blocks", "samples") for how in ("20 ms", "100 ms", "20 ms, faults")
    }
    assert found["samples, 20 ms, faults"]["trouble"]["http_5xx"] > 0
    assert found["local"]["requests"] == 0

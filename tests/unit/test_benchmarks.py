"""Benchmarks are code that works: each runs on something small."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from benchmarks import (
    checkpoint_scale,
    data,
    data_paths,
    data_peers,
    data_setup,
    data_state,
    data_store,
    observe_cost,
    timing,
)
from benchmarks.training import Training, global_batch
from data_pipeline.indexing import index_folder
from ecdit_train.config.compose import compose
from ecdit_train.parallel.runtime import alone


@pytest.fixture
def results(monkeypatch, tmp_path):
    """Where the dated JSON goes instead."""
    monkeypatch.setattr(timing, "RESULTS", tmp_path)
    return tmp_path


def test_what_watching_costs_is_measured(results, capsys):
    assert observe_cost.main(["--rounds", "2", "--only", "the demo"]) in (0, 1)  # two rounds are no measurement
    (bar,) = timing.read_bars("observe_cost")
    assert 0 < bar.value < 0.2


def test_the_step_that_is_measured_trains_and_is_guarded():
    config = compose(["experiment=shapes_tiny"], local=False)
    training, micros = Training(config, alone(), lr=1e-3), global_batch(config)
    positions = torch.cat([m.position_B for m in micros])
    assert torch.equal(positions, torch.arange(config.train.global_batch))
    before = {name: p.detach().clone() for name, p in training.state.params.items()}
    assert training.step(micros).numbers().applied
    made = {name: p.detach().clone() for name, p in training.state.params.items()}
    assert any(not torch.equal(made[name], before[name]) for name in made)
    micros[-1].latents_BCHW[0, 0, 0, 0] = torch.inf
    assert not training.step(micros).numbers().applied
    assert all(torch.equal(p, made[name]) for name, p in training.state.params.items())


def test_planning_a_save_and_a_load_are_measured_on_a_few_ranks():
    costs = checkpoint_scale.planning_and_load(checkpoint_scale.Network(), checkpoint_scale.degrees(4, ep=4), [0, 3])
    assert {"planning", "save", "load"} < costs.keys()
    assert all(costs[part]["peak_mb"] > 0 for part in ("planning", "save", "load"))
    assert costs["manifest_mb"] > 0


@pytest.mark.parametrize("kind", ["jpeg", "latent", "latent_text"])
def test_paths_of_data_are_measured_on_a_few_samples(kind):
    found = data_paths.measure(kind, samples=64, rounds=1)
    assert min(found.values()) > 0


def test_a_store_with_latency_and_faults_is_measured_against_its_folder(capsys, results):
    assert data_store.main(["--shards", "4", "--samples", "64", "--rounds", "1", "--steps", "3", "--step", "0"]) in (
        0,
        1,
    )
    told = capsys.readouterr().out
    found = json.loads(told[: told.rindex("}") + 1])
    assert len(timing.read_bars("data_store")) == 2
    assert set(found) == {"local"} | {
        f"{what}, {how}" for what in ("blocks", "samples") for how in ("20 ms", "100 ms", "20 ms, faults")
    }
    assert found["samples, 20 ms, faults"]["trouble"]["http_5xx"] > 0
    assert found["local"]["requests"] == 0


def test_the_state_is_small_and_equal_and_the_order_mixes():
    state = data_state.state_bytes(sources=(1, 5), worlds=(1, 64))
    assert 100 < state["largest"] <= 1024
    assert state["unequal"] == 0
    mixed = data_state.mixing(shards=64, global_batch=128, world=8, batches=40)
    assert 0.5 < mixed["pair_rate"] < 1.1
    assert 1 <= mixed["amplification"] < 1.5
    first = data_state.resume(samples=64, rounds=1)
    assert first["at_0_ms"] > 0
    assert first["ratio"] > 0


def test_what_the_start_of_a_run_costs_is_measured(results, capsys):
    assert data_setup.main(["--shards", "2000", "--samples", "10"]) == 0
    assert [bar.passed for bar in timing.read_bars("data_setup")] == [True, True]


FEW = 200


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    with pytest.MonkeyPatch.context() as here:
        here.setattr(data_peers, "PER_SHARD", FEW)
        data_peers.make_tars(folder)
    index_folder(folder)
    return folder


@pytest.mark.parametrize("name", ["floor", "ours", "webdataset, our decoder", "torchdata over our index, our decoder"])
def test_peers_make_the_same_batches(photos, monkeypatch, name):
    monkeypatch.setattr(data_peers, "WARM", 2)
    monkeypatch.setattr(data_peers, "PER_SHARD", FEW)
    assert data_peers.measure(name, photos, batches=2)["us"] > 0


def test_a_peer_that_does_less_is_found_out():
    with pytest.raises(RuntimeError, match=r"makes float32 .*: this is not the same work"):
        data_peers.check("peer", (np.zeros((64, 256, 256, 3), np.float32), []))


def test_all_parts_end_in_one_table(monkeypatch, results, capsys):
    def broken(words: list[str]) -> int:
        raise OSError("no disk")

    def slow(words: list[str]) -> int:
        bar = timing.Bar(name="a bar", value=2.0, limit=1.0, at_least=False)
        return timing.report("data_paths", settings={}, ratios={}, bars=[bar])

    monkeypatch.setitem(data.PARTS, "data_peers", broken)
    monkeypatch.setitem(data.PARTS, "data_paths", slow)
    assert data.main(["--only", "data_peers", "data_paths"]) == 1
    table = capsys.readouterr().out.partition("--- all of them")[2]
    assert "FAIL  data_peers: ended with an error" in table
    assert "FAIL  a bar" in table

"""What machines do, by number: one rank speaks for each, the numbers meet in the window's sums."""

from __future__ import annotations

import ctypes
import math

import numpy as np
import pytest
import torch

from ecdit_train.observe import nodes
from ecdit_train.observe.metrics import undocumented
from ecdit_train.observe.nodes import KEY, Nodes, node_key, nodes_record


@pytest.fixture
def proc(tmp_path, monkeypatch):
    """A machine of 8 GiB, of which 3 are taken; its processors are busy for 30 of 100 ticks between two looks."""
    monkeypatch.setattr(nodes, "PROC", tmp_path)
    (tmp_path / "meminfo").write_text(f"MemTotal: {8 * 2**20} kB\nMemFree: 1 kB\nMemAvailable: {5 * 2**20} kB\n")
    (tmp_path / "stat").write_text("cpu  100 0 50 800 50 0 0 0 0 0\ncpu0 1 2 3\n")
    return tmp_path


def _ranks(said):
    return [Nodes(said, rank=rank, device=torch.device("cpu")) for rank in range(len(said))]


def _record(ranks):
    """As `MetricWindow` adds up what ranks give."""
    given = [rank.sums()[KEY].numpy() for rank in ranks]
    assert len({part.shape for part in given}) == 1, "the same on every rank"
    return nodes_record({KEY: np.sum(given, 0)})


def test_one_rank_of_each_node_speaks(proc):
    """Two nodes of two ranks, ranks dealt out in turn, and a third of which no rank reaches the record."""
    ranks = _ranks([["a", True], ["b", False], ["a", True], ["b", True], ["c", False]])
    (proc / "stat").write_text("cpu  120 0 60 865 55 0 0 0 0 0\n")
    spoken = [rank.sums()[KEY].any().item() for rank in ranks]
    assert spoken == [True, False, False, True, False]
    (proc / "stat").write_text("cpu  140 0 70 930 60 0 0 0 0 0\n")
    record = _record(ranks)
    assert record == {
        "perf/node0/cpu_frac": 0.3,
        "perf/node1/cpu_frac": 0.3,
        "mem/node0/host_gib": 3.0,
        "mem/node1/host_gib": 3.0,
    }
    assert not undocumented(record)


def test_what_nobody_can_say_is_left_out(proc):
    ranks = _ranks([["a", True]])
    (proc / "stat").write_text("no such thing")
    assert _record(ranks) == {"mem/node0/host_gib": 3.0}
    (proc / "meminfo").unlink()
    assert _record(ranks) == {}
    assert nodes_record({}) == {}


def test_many_nodes_are_three_numbers():
    values = np.full((nodes.MOST + 1, 1 + len(nodes.FIELDS)), math.nan)
    values[:, 0] = 1
    values[:, 1] = np.linspace(0, 1, nodes.MOST + 1)
    values[0, 1] = math.nan
    record = nodes_record({KEY: values.flatten()})
    assert record == {
        "perf/nodes/cpu_frac_min": pytest.approx(1 / nodes.MOST),
        "perf/nodes/cpu_frac_mean": pytest.approx((1 + 1 / nodes.MOST) / 2),
        "perf/nodes/cpu_frac_max": 1.0,
    }
    assert not undocumented(record)
    assert len(nodes_record({KEY: values[1:].flatten()})) == nodes.MOST


def test_no_name_of_a_machine_is_in_its_key(monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "secret-host")
    assert "secret" not in node_key()
    assert node_key() == node_key()
    mine = node_key()
    monkeypatch.setattr("socket.gethostname", lambda: "other-host")
    assert node_key() != mine


class Driver:
    """Two GPUs; the second is partitioned and does not say its use."""

    def nvmlInit_v2(self):
        return 0

    def nvmlDeviceGetCount_v2(self, count):
        count._obj.value = 2
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, number, handle):
        handle._obj.value = number.value + 1
        return 0

    def nvmlDeviceGetUtilizationRates(self, handle, rates):
        rates._obj.gpu = 80
        return 0 if handle.value == 1 else 3

    def nvmlDeviceGetMemoryInfo(self, handle, memory):
        memory._obj.used = handle.value * 4 * 2**30
        return 0


def test_gpus_are_asked_by_the_drivers_own_library(proc, monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    found = nodes._Nvml.found()
    assert found is not None
    assert found.look() == [0.8, 6.0]

    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert nodes._Nvml.found() is None

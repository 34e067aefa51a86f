"""Windows of metrics, and that every logged name is described."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal

import pytest
import torch
from observe_demo_run import assignments, picture, routing_scalars
from torch import Tensor

from ecdit_train.observe.journal import read_records
from ecdit_train.observe.metrics import METRICS, AllReduce, MetricWindow, metric_key, undocumented

GROUPS = {"train", "optim", "moe", "diffusion", "perf", "mem", "data", "reliability", "eval", "samples", "ckpt"}


def window(**more: float) -> MetricWindow:
    return MetricWindow(device="cpu", images_per_step=64, tokens_per_step=2048, **more)


def test_reductions_over_a_window() -> None:
    w = window()
    for n in (1.0, 2.0, 6.0):
        w.add("train/loss", torch.tensor(n, requires_grad=True))
        w.add("optim/grad_norm_max", torch.tensor(n))
        w.add("optim/lr", n / 10)
        w.add("data/substituted", n)
        w.step_done()
    record = w.flush()
    assert record["train/loss"] == 3.0
    assert record["optim/grad_norm_max"] == 6.0
    assert record["optim/lr"] == pytest.approx(0.6)
    assert record["data/substituted"] == 9.0
    assert "train/loss" not in w.flush()


def test_throughput_stall_and_mfu() -> None:
    w = window(flops_per_step=1e9, peak_flops=1e11)
    with w.waiting():
        time.sleep(0.05)
    time.sleep(0.05)
    with w.paused():
        time.sleep(0.3)
    w.step_done()
    w.step_done()
    record = w.flush()
    assert 0.04 < record["perf/step_s"] < 0.1
    assert record["perf/images_per_s"] == pytest.approx(64 / record["perf/step_s"])
    assert record["perf/tokens_per_s"] == pytest.approx(2048 / record["perf/step_s"])
    assert record["perf/mfu"] == pytest.approx(0.01 / record["perf/step_s"])
    assert 0.35 < record["data/stall_frac"] < 0.65
    assert not {"perf/mfu", "mem/allocated_gib"} & set(window().flush())


def test_what_happens_inside_of_a_pause_is_not_a_step_s() -> None:
    w, spent = window(), iter([1.0, 30.0, 3.0])
    w.inside = lambda: {"expert_exchange": next(spent)}
    with w.paused():
        pass
    w.step_done()
    w.step_done()
    assert w.flush()["perf/time/expert_exchange"] == 2.0


def test_times_of_phases_are_means_over_ranks_and_those_without_waits_tell_the_slowest() -> None:
    """Two ranks, of which one has never been in a phase of the other: they still reduce the same names."""
    w, other = window(), window()
    for mine, spent in ((w, {"data": 2.0, "forward": 1.0}), (other, {"data": 6.0, "show": 4.0})):
        mine.inside = lambda spent=spent: spent  # type: ignore[misc]
        mine.step_done()
        mine.step_done()
    record = w.flush(beside(other))
    assert {name: value for name, value in record.items() if name.startswith(("perf/time/", "perf/slowest/"))} == {
        "perf/time/data": 2.0,
        "perf/time/forward": 0.25,
        "perf/time/show": 1.0,
        "perf/slowest/data": 3.0,
    }


def beside(peer: MetricWindow) -> AllReduce:
    """The exchange of two ranks, of which the other one has this window."""
    told: dict[str, Tensor] = {}
    peer.flush(lambda vector, *, op: told.setdefault(op, vector))

    def all_reduce(vector: Tensor, *, op: Literal["max", "sum"]) -> Tensor:
        assert vector.dtype == torch.float64
        return torch.maximum(vector, told[op]) if op == "max" else vector + told[op]

    return all_reduce


def test_ranks_reduce_as_the_table_says() -> None:
    """Two ranks of equal values but for a factor 3: mean 2, max 3, sum 4 times those of the first."""

    w = window()
    other = window()
    for mine, factor in ((w, 1.0), (other, 3.0)):
        mine.add_all(dict.fromkeys(("train/loss", "optim/grad_norm_max", "data/substituted"), factor))
        mine.add_all({"optim/lr": 1.0, "train/images": 1_000_000_001.0})
    record = w.flush(beside(other))
    expected = {
        "train/loss": 2.0,
        "optim/grad_norm_max": 3.0,
        "data/substituted": 4.0,
        "optim/lr": 1.0,  # a float of `last` is equal on all ranks
        "train/images": 1_000_000_001.0,
    }
    assert {k: record[k] for k in expected} == expected
    w.add("optim/lr", torch.tensor(1.0))
    other.add("optim/lr", torch.tensor(3.0))
    assert w.flush(beside(other))["optim/lr"] == 2.0  # a tensor of `last` is a rank's own


def test_a_saved_window_holds_the_sum_of_all_ranks_once() -> None:
    """Two ranks of 3 substituted samples each are 6 after a resume, on any number of ranks."""

    def twice(vector: Tensor, *, op: Literal["mean", "max", "sum"]) -> Tensor:
        return vector * {"mean": 1, "max": 1, "sum": 2}[op]

    w = window()
    w.add_all({"train/loss": 1.0, "data/substituted": 3.0})
    state = w.state_dict(twice)
    assert state == {"train/loss": [1.0, 1], "data/substituted": [6.0, 1]}
    records = []
    for first in (True, False):
        again = window()
        again.load_state_dict(state, first=first)
        again.add("data/substituted", 1.0)
        records.append(again.flush())
    assert [r["data/substituted"] for r in records] == [7.0, 1.0]
    assert [r["train/loss"] for r in records] == [1.0, 1.0]


def test_sums_of_a_saved_window_are_taken_over_once() -> None:
    """As values are: all of them on the first rank, whose share then joins what the next steps add."""
    w, other = window(), window()
    w.add_sums({"diffusion/images": torch.tensor([1, 2]), "diffusion/loss": torch.tensor([0.5, 0.25])})
    other.add_sums({"diffusion/images": torch.tensor([10, 20]), "diffusion/loss": torch.tensor([4.0, 8.0])})
    kept: list[Tensor] = []
    other.state_dict(lambda vector, *, op: (kept.append(vector), vector)[1])
    state = w.state_dict(lambda vector, *, op: vector + kept[0])
    assert state == {"sums:diffusion/images": [11.0, 22.0], "sums:diffusion/loss": [4.5, 8.25]}
    seen: list[dict[str, list[float]]] = []
    for first in (True, False):
        again = window()
        again.load_state_dict(state, first=first)
        again.add_sums({"diffusion/images": torch.tensor([1, 1])})
        again.flush(reading=lambda sums: seen.append({k: v.tolist() for k, v in sums.items()}) or {})
    assert [s["diffusion/images"] for s in seen] == [[12.0, 23.0], [1.0, 1.0]]
    assert [s["diffusion/loss"] for s in seen] == [[4.5, 8.25], [0.0, 0.0]]


def test_logs_of_earlier_versions_are_read_with_todays_names(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loader/samples": 8, "validation/loss": 0.5, "perf/memory_gib": 2.0, "train/loss": 1.0}\n'
    )
    (record,) = read_records(tmp_path)
    assert record == {
        "step": 1, "data/loader/samples": 8, "eval/loss": 0.5, "mem/allocated_gib": 2.0, "train/loss": 1.0}  # fmt: skip
    assert undocumented({k: v for k, v in record.items() if k != "step"}) == set()


def test_an_undescribed_name_cannot_be_logged() -> None:
    with pytest.raises(AssertionError, match="train/losss"):
        window().add("train/losss", 1.0)


def test_the_table_describes_what_observe_logs_and_nothing_else_of_it() -> None:
    images = torch.stack([torch.from_numpy(picture(n, noise=0.1)) for n in range(2)]).numpy()
    layers = (2, 4, 6)
    routing = routing_scalars([assignments(images, t=0.5)], layers=layers) | routing_scalars(
        [assignments(images, t=0.5, token_choice=True)], layers=layers
    )
    assert undocumented(routing) == set()
    of_others = {
        k
        for k in METRICS
        if "{name}" in k
        or k.endswith(("capped_frac", "predictor_accuracy", "predicted_experts_per_token"))
        or "expert_similarity" in k
    }  # a router of one's own, a static cap, DiffMoE's; weights, which are not at hand here
    assert {metric_key(k) for k in routing} == {k for k in METRICS if k.startswith("moe/")} - of_others
    assert metric_key("moe/L4/mine_max") == "moe/L{n}/{name}_max"
    assert metric_key("moe/mine") == "moe/{name}"
    assert metric_key("train/mine_loss") == "train/{name}_loss"
    assert undocumented({"train/mine": 1.0}) == {"train/mine"}
    w = window(flops_per_step=1.0, peak_flops=1.0, planned_mfu=0.5)
    w.enter("forward")
    w.step_done()
    measured = w.flush()
    assert undocumented(measured) == set()
    assert {k for k in METRICS if k.startswith(("perf/", "mem/"))} - {metric_key(k) for k in measured} == {
        *("mem/allocated_gib", "mem/reserved_gib", "mem/retries"),  # CUDA only
        *("perf/goodput", "perf/time/expert_exchange", "perf/slowest/{phase}"),  # of a life; of several ranks; of data
        *(name for name in METRICS if "/node" in name),  # test_nodes.py
    }


def test_descriptions() -> None:
    for name, metric in METRICS.items():
        assert name.split("/")[0] in GROUPS
        assert metric.unit
        assert len(metric.question) > 10
        assert str(metric).endswith(f"[{metric.unit}; {metric.reduction}]")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_adding_does_not_synchronise() -> None:
    w = MetricWindow(device="cuda", images_per_step=1, tokens_per_step=1)
    value = torch.ones((), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            w.add("train/loss", value)
            w.add("optim/grad_norm_max", value)
            w.step_done()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert w.flush()["train/loss"] == 1.0

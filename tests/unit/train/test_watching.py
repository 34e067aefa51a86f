"""What a run tells of its steps: files beside the records, and that watching changes and ends nothing."""

from __future__ import annotations

import logging

import pytest
from tiny_runs import assert_same, configure, live, records

from ecdit_train.observe.routing_numbers import RoutingNumbers, numbers_of
from ecdit_train.train.watching import Watched, Watching


def test_numbers_lie_beside_the_records_they_belong_to(tiny_shards, tmp_path):
    live(configure(tmp_path, tiny_shards, "train.steps=6", "observe.log_every=4"))
    lines = {line["step"]: line for line in records(tmp_path)}
    files = numbers_of(tmp_path)
    assert [step for step, _ in files] == sorted(lines) == [4, 6]
    for step, path in files:
        numbers, line = RoutingNumbers.load(path), lines[step]
        layer = numbers.layers[2]
        tokens = layer.spread.sum()
        assert layer.spread[:, 0].sum() / tokens == pytest.approx(line["moe/L2/dropped_frac"])
        assert max(k for row in layer.spread for k, n in enumerate(row) if n) == line["moe/L2/experts_per_token_max"]
        assert sum(line[f"diffusion/images_t{b}"] for b in range(10)) == 8 * (4 if step == 4 else 2)  # of the window
        for b, row in enumerate(layer.spread):  # of its last step
            assert (row.sum() > 0) == (f"moe/experts_per_token_t{b}" in line)


def test_a_disk_that_refuses_them_ends_nothing(tiny_shards, tmp_path, monkeypatch, caplog):
    def refuse(numbers, run):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RoutingNumbers, "save", refuse)
    with caplog.at_level(logging.WARNING, logger="ecdit.train"):
        assert live(configure(tmp_path, tiny_shards, "train.steps=2", "optim.warmup_steps=1")).finished
    assert [line["step"] for line in records(tmp_path)] == [1, 2]
    assert "the routing numbers of step 1 cannot be written, training goes on" in caplog.text


def test_watching_changes_no_bit(tiny_shards, tmp_path, monkeypatch):
    """With every number gathered at every step, and with none of them."""
    seeing = live(configure(tmp_path / "seeing", tiny_shards))
    monkeypatch.setattr(Watching, "see", lambda watching, step, seen: Watched(sums=[], maxima=[]))
    blind = live(configure(tmp_path / "blind", tiny_shards))
    assert_same(seeing.tensors, blind.tensors)
    seen, unseen = ([{k: v for k, v in line.items() if k.startswith(("train/", "optim/"))} for line in records(tmp_path / run)]
                    for run in ("seeing", "blind"))  # fmt: skip
    assert seen == unseen
    assert not any(k.startswith(("moe/", "diffusion/")) for line in records(tmp_path / "blind") for k in line)


def test_goodput_is_of_a_life_and_below_one(tiny_shards, tmp_path):
    config = configure(tmp_path, tiny_shards, "train.steps=6")
    live(config, stop_after=3)
    live(config)
    for line in records(tmp_path):
        assert 0 < line["perf/goodput"] < 1  # the start counts as lost
        phases = {name: spent for name, spent in line.items() if name.startswith("perf/time/")}
        wanted = ["forward", "backward", "exchange", "optimizer"]
        if line["step"] not in (
            3,
            6,
        ):  # the next batch is fetched within a step; before the end of a life there is none
            wanted += ["data", "encode"]
        assert {f"perf/time/{phase}" for phase in wanted} <= phases.keys()
        in_step = sum(spent for name, spent in phases.items() if not name.endswith("/save"))  # saves are paused for
        assert in_step <= 1.1 * line["perf/step_s"] + 0.1
        assert in_step >= 0.5 * line["perf/step_s"] - 0.05

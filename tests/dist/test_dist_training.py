"""One training run on many layouts is one training run: the same samples in the same order, the same losses; looking
at it and stopping it change no bit; a bad number on one rank stops all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dist_compare import RECORD_BOUND, record_error
from dist_harness import run_distributed
from dist_runs import Layout, Life
from dist_training import curves, interrupted, looked_at, poisoned
from tiny_runs import records, steady

from ecdit_train import checkpoint
from ecdit_train.checkpoint import manifest

STEPS, MORE = 20, 50
RUN = ("train.global_batch=8", "train.microbatch=2", "optim.warmup_steps=10",
       "checkpoint.every_steps=1000")  # fmt: skip
UNTRAINED = Layout(world=1, words=("optim.lr=1e-12",))
LAYOUTS = {
    "one": Layout(world=1),  # 4 microbatches
    "dp2": Layout(world=2),  # 2 microbatches on each rank
    "tp2": Layout(world=2, words=("parallel.tp=2",)),
    "dp2_ep2": Layout(world=2, words=("parallel.ep=2", "train.microbatch=4", "parallel.overlap_chunks=2")),
    "dp2_tp2_ep4": Layout(world=4, words=("parallel.tp=2", "parallel.ep=4")),
    "hsdp2x2_ep2": Layout(world=4, words=("parallel.dp_replicate=2", "parallel.ep=2")),
}


def on_layouts(folder: Path, shards: Path, extra: tuple[str, ...], *, steps: int) -> dict[str, Life]:
    """All layouts of one world in one start of its ranks."""
    extra = (*extra, f"train.steps={steps}")
    lives: dict[str, Life] = {}
    for world in sorted({layout.world for layout in LAYOUTS.values()}):
        some = {name: layout for name, layout in LAYOUTS.items() if layout.world == world}
        answers = run_distributed(world, curves, folder, shards, some, extra, timeout=300)
        assert all(answer == answers[0] for answer in answers), "ranks tell different stories"
        lives |= answers[0]
    return lives


def learned(one: Life, folder: Path, shards: Path, extra: tuple[str, ...]) -> bool:
    """Whether the last steps are better than without updates: else equal curves would say little."""
    extra = (*extra, f"train.steps={len(one.losses)}")
    frozen = run_distributed(1, curves, folder, shards, {"untrained": UNTRAINED}, extra, timeout=300)[0]["untrained"]
    assert frozen.order == one.order
    return sum(one.losses[-10:]) < 0.9 * sum(frozen.losses[-10:])


def check_first_records(lives: dict[str, Life], folder: Path) -> None:
    """What is logged of the first step, whose weights are the same everywhere, is the same on all layouts: over every microbatch
    and rank, tensor-parallel ranks counted once."""
    first = {name: steady(records(folder / name))[0] for name in lives}
    numbers = {name for name in first["one"] if name.startswith(("train/", "moe/", "diffusion/", "optim/"))}
    assert {name.partition("/")[0] for name in numbers} >= {"train", "moe", "diffusion"}
    for layout, record in first.items():
        assert record.keys() == first["one"].keys(), layout
        pairs = {name: (record[name], first["one"][name]) for name in numbers}
        wrong = {name: pair for name, pair in pairs.items() if record_error(name, *pair) > RECORD_BOUND}
        assert not wrong, (layout, wrong)
        counted = ("images", "dropped_frac", "dropped_everywhere_frac", "dead_experts", "experts_per_token_max")
        counts = {name: pair for name, pair in pairs.items() if name.endswith(counted) or "/images_t" in name}
        assert len(counts) > 10
        assert all(mine == theirs for mine, theirs in counts.values()), (layout, counts)


def check_exchanges(folder: Path) -> None:
    """The experts' exchange is timed where there is one that nothing hides, and is a part of the passes it is in."""
    for name, layout in LAYOUTS.items():
        told = [line.get("perf/time/expert_exchange") for line in records(folder / name)]
        words = " ".join(layout.words)
        if "ep=" not in words or "overlap_chunks" in words:
            assert told == [None] * len(told), name
        else:
            inside = [line["perf/time/forward"] + line["perf/time/backward"] for line in records(folder / name)]
            assert all(0 < exchange < passes for exchange, passes in zip(told, inside, strict=True)), name


def check(lives: dict[str, Life], folder: Path, *, bound: float) -> float:
    one = lives["one"]
    check_first_records(lives, folder)
    check_exchanges(folder)
    worst = 0.0
    for name, life in lives.items():
        assert life.finished
        assert life.order == one.order, name
        assert [p for step in life.order for p in step[0]] == list(range(8 * len(one.losses)))
        errors = [abs(a - b) / b for a, b in zip(life.losses, one.losses, strict=True)]
        error = max(errors)
        first = next((step for step, e in enumerate(errors) if e > bound), None)
        assert error <= bound, (name, error, "first at step", first, "before it", max(errors[:first], default=0.0))
        worst = max(worst, error)
        print(f"{name}: {error:.1e}")
        logged = [line["train/loss"] for line in records(folder / name)]
        assert logged == pytest.approx(life.losses, rel=1e-6)  # what is shown is the global mean
    assert len({life.losses for life in lives.values()}) > 1, "not one bit differs: was anything spread at all?"
    return worst


@pytest.mark.parametrize("steps", [STEPS, pytest.param(MORE, marks=pytest.mark.slow)])
def test_one_run_on_six_layouts(steps, tiny_shards, tmp_path):
    lives = on_layouts(tmp_path, tiny_shards, RUN, steps=steps)
    assert len(lives["one"].losses) == steps
    assert learned(lives["one"], tmp_path, tiny_shards, RUN)
    worst = check(lives, tmp_path, bound=1e-4)
    print(f"largest relative difference of a loss: {worst:.1e}")


# Token choice at the demo's rate of 4e-3 amplifies rounding until one token changes its expert (first at step 30, dp2).
@pytest.mark.slow
@pytest.mark.parametrize("extra", [
    ("moe=token_choice", "optim.lr=1e-3"), ("moe/dispatcher=deterministic",), ("moe.scope=image",),
    ("optim/optimizer=rmsprop", "optim.lr=1e-4"), ("parallel.activation_checkpointing=selective",),
    ("model.layers=4", "parallel.reshard_after_forward=none"),
], ids=lambda extra: extra[0])  # fmt: skip
def test_variants_on_six_layouts(extra, tiny_shards, tmp_path):
    print(f"{check(on_layouts(tmp_path, tiny_shards, RUN + extra, steps=MORE), tmp_path, bound=1e-4):.1e}")


TWO_RANKS = {
    "dp2_ep2": ("train.microbatch=2", "parallel.ep=2"),
    "tp2": ("train.microbatch=2", "parallel.tp=2"),
    "dp2_bf16": ("train.microbatch=4", "train.precision=bf16"),
}


def some(*names: str) -> list[Any]:
    """All of `TWO_RANKS`, of which the default suite runs these."""
    return [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in TWO_RANKS]


def data_files(run: Path) -> dict[str, bytes]:
    """The tensors' bytes of every checkpoint; headers and manifests name the save and the configuration, which differ."""
    return {
        f"{committed.step} {name}": checkpoint.load_full(committed.path, name=name)
        .reshape(-1)
        .view(torch.uint8)
        .numpy()
        .tobytes()
        for committed in checkpoint.find(run / "checkpoints")
        for name in manifest.read(committed.path).tensors
    }


@pytest.mark.parametrize("name", some("dp2_ep2"))
def test_drawing_does_not_touch_training(name, tiny_shards, tmp_path):
    """FSDP keeps the root gathered after a forward pass without a backward: weights changed in their shards, as the
    average is swapped in, would go unseen."""
    runs = {name: TWO_RANKS[name]}
    blind, seeing = run_distributed(2, looked_at, tmp_path, tiny_shards, runs, timeout=240)[0][name]
    assert len(list((tmp_path / name / "seeing" / "samples").glob("*.png"))) == 6
    assert seeing.losses == blind.losses
    assert seeing.tensors == blind.tensors
    files = data_files(tmp_path / name / "blind")
    assert len({name.partition(" ")[0] for name in files}) == 2, "of two steps"
    assert data_files(tmp_path / name / "seeing") == files


@pytest.mark.parametrize("name", some("tp2", "dp2_bf16"))
def test_interrupted_and_resumed(name, tiny_shards, tmp_path):
    runs = {name: TWO_RANKS[name]}
    whole, *parts = run_distributed(2, interrupted, tmp_path, tiny_shards, runs, timeout=240)[0][name]
    assert [life.step for life in parts] == [1, 5, 12]
    assert [life.finished for life in parts] == [False, False, True]
    assert tuple(loss for life in parts for loss in life.losses) == whole.losses
    assert tuple(step for life in parts for step in life.order) == whole.order
    assert parts[1].loaded == parts[0].tensors
    assert parts[2].loaded == parts[1].tensors
    assert parts[2].tensors == whole.tensors
    last = "12 "
    files = {name: data for name, data in data_files(tmp_path / name / "parts").items() if name.startswith(last)}
    assert files, "the last step was not saved"
    assert files == {n: data for n, data in data_files(tmp_path / name / "whole").items() if n.startswith(last)}
    a, b = (steady(records(tmp_path / name / run)) for run in ("whole", "parts"))
    assert a == b


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_bad_number_on_one_rank_stops_all(where, tiny_shards, tmp_path):
    variants = {name: extra for name, extra in TWO_RANKS.items() if name != "dp2_bf16"}
    for name, ranks in run_distributed(2, poisoned, tmp_path, tiny_shards, variants, where, timeout=120)[0].items():
        for rank in ranks:
            assert rank["code"] == 80, (name, rank)
            assert rank["step"] == 2, (name, rank)  # the third step did not count
            assert rank["unchanged"], (name, rank)
            assert rank["message"].startswith("step 3, samples 16 to 23: loss "), rank["message"]
            assert ("(first seen in the loss of rank 1)" in rank["message"]) == (where == "loss"), rank["message"]
            assert rank["message"].endswith("the update was not applied")
        assert not list((tmp_path / name / "checkpoints").glob("step_*"))

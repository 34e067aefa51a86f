"""A checkpoint belongs to no layout: what one saves, every other loads bit for bit, and the same losses follow."""

from __future__ import annotations

from pathlib import Path

import pytest
from dist_checkpoints import FIRST, RUN, STEPS, naive, pairs, sources
from dist_harness import run_distributed
from dist_runs import TWO_HEADS, Layout, Life, digest
from tiny_runs import configure

from ecdit_train.build import build_trainer
from ecdit_train.checkpoint import restore
from ecdit_train.checkpoint.manifest import read
from ecdit_train.errors import CheckpointError
from ecdit_train.parallel import runtime

# Two experts on four ranks: experts are then cut inside, not between. One kv head, which two tp ranks both hold.
LAYOUTS = {
    "one": Layout(world=1),
    "dp2": Layout(world=2),
    "tp2": Layout(world=2, words=("parallel.tp=2",)),
    "dp2_ep2": Layout(world=2, words=("parallel.ep=2",)),
    "hsdp2x2": Layout(world=4, words=("parallel.dp_replicate=2",)),
    "copies2x2": Layout(world=4, words=("parallel.dp_replicate=2", "parallel.replicate_experts=true")),
    "dp2_tp2_ep2": Layout(world=4, words=("parallel.tp=2", "parallel.ep=2")),
}
MORE = {
    "tp2_ep2": Layout(world=2, words=("parallel.tp=2", "parallel.ep=2")),
    "dp4_ep2": Layout(world=4, words=("parallel.ep=2",)),
}
SOME = [
    ("one", "dp2_tp2_ep2"), ("dp2_tp2_ep2", "one"), ("dp2", "tp2"), ("tp2", "dp2_ep2"), ("dp2_ep2", "hsdp2x2"),
    ("hsdp2x2", "copies2x2"), ("copies2x2", "dp2"),
]  # fmt: skip
"""Each layout once as a source and once as a target."""


def by_world(names: list[str]) -> dict[int, dict[str, Layout]]:
    worlds: dict[int, dict[str, Layout]] = {}
    for name in names:
        layout = (LAYOUTS | MORE)[name]
        worlds.setdefault(layout.world, {})[name] = layout
    return worlds


@pytest.fixture(scope="module")
def saved(tiny_shards, tmp_path_factory) -> tuple[Path, dict[str, Life]]:
    """A folder with a run of four steps under each layout, and their lives."""
    folder, lives = tmp_path_factory.mktemp("sources"), {}
    for world, layouts in by_world(list(LAYOUTS)).items():
        lives |= run_distributed(world, sources, folder, tiny_shards, layouts, timeout=240)[0]
    return folder, lives


def check(saved: tuple[Path, dict[str, Life]], shards: Path, wanted: list[tuple[str, str]]) -> float:
    folder, lives = saved
    loaded: dict[tuple[str, str], Life] = {}
    for world, layouts in by_world([target for _, target in wanted]).items():
        here = [pair for pair in wanted if pair[1] in layouts]
        loaded |= run_distributed(world, pairs, folder, shards, layouts, here, timeout=600)[0]
    worst = 0.0
    reference = loaded[wanted[0]]
    for (source, target), life in loaded.items():
        assert life.loaded == lives[source].tensors, f"{source} -> {target}"
        assert life.step == STEPS
        assert len(life.losses) == STEPS - FIRST
        assert life.order == reference.order, f"{source} -> {target}"
        error = max(abs(a - b) / b for a, b in zip(life.losses, reference.losses, strict=True))
        assert error <= 1e-5, (source, target, error)
        worst = max(worst, error)
    return worst


def test_files_hold_the_whole_tensors(saved):
    """What tools read is what the ranks held."""
    folder, lives = saved
    kinds = set()
    for name in ("tp2", "hsdp2x2", "copies2x2", "dp2_tp2_ep2"):
        life = lives[name]
        path = folder / name / "checkpoints" / f"step_{FIRST:08d}"
        described = restore.verify(path)
        assert described.tensors.keys() == life.tensors.keys()
        for tensor, wanted in life.tensors.items():
            assert digest(restore.load_full(path, name=tensor)) == wanted, (name, tensor)
            kinds.add(tensor.partition("/")[0])
    assert kinds == {"model", "ema", "optim.exp_avg", "optim.exp_avg_sq"}


def test_pairs(saved, tiny_shards):
    """7 of the 49 pairs; all losses are compared with each other, also where rounding before the save differed."""
    assert {s for s, _ in SOME} == {t for _, t in SOME} == LAYOUTS.keys()
    print(f"largest relative difference of a loss: {check(saved, tiny_shards, SOME):.1e}")


@pytest.mark.slow
def test_all_pairs(tiny_shards, tmp_path):
    """81 ordered pairs of 9 layouts."""
    lives: dict[str, Life] = {}
    names = list(LAYOUTS | MORE)
    for world, layouts in by_world(names).items():
        lives |= run_distributed(world, sources, tmp_path, tiny_shards, layouts, timeout=240)[0]
    every = [(source, target) for source in names for target in names]
    print(f"largest relative difference of a loss: {check((tmp_path, lives), tiny_shards, every):.1e}")


def test_shards_taken_for_whole_tensors_are_caught(tiny_shards, tmp_path):
    """Negative control: without ParamPlacement a tp or ep shard looks like the tensor."""
    layouts = {name: LAYOUTS[name] for name in ("tp2", "dp2_ep2")}
    for name, (mesh_only, no_mesh, trusted) in run_distributed(2, naive, tmp_path, tiny_shards, layouts)[0].items():
        assert "lacks its ParamPlacement" in mesh_only, (name, mesh_only)
        assert "lacks its ParamPlacement" in no_mesh, (name, no_mesh)
        assert trusted == "saved"
        path = tmp_path / name / "naive-2" / "step_00000001"
        config = configure(tmp_path / "whole" / name, tiny_shards, *RUN, *TWO_HEADS)
        whole = build_trainer(config, runtime.start("cpu", env={}), stop_after=None)
        whole.close()
        targets = whole.placed()
        with pytest.raises(CheckpointError, match="does not fit"):
            restore.load(path, targets=targets)
        part = "experts.up" if name == "dp2_ep2" else "self_attention.query.weight"
        wrong = [n for n, entry in read(path).tensors.items() if entry.info.shape != targets[n].placement.global_shape]
        assert any(part in n for n in wrong)

"""Every preset's layout is the plan's own choice, runs, and is fast enough; large ones on twice their machines as well."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from ecdit_train.config.compose import conf_folder
from ecdit_train.config.validate import validate
from ecdit_train.plan import layout, parameters, search
from ecdit_train.plan.cost import cost

PRESETS = sorted(file.stem for file in (conf_folder() / "experiment").glob("*.yaml"))
PAPER = [name for name in PRESETS if name.startswith(("ec_dit_", "gshard_", "dense_"))]
OFTEN = ("dense_xl", "ec_dit_xl_8e", "ec_dit_xxl_32e", "ec_dit_3xl_32e", "ec_dit_m_64e", "race_b")
"""Those that are searched in every run of the tests."""
NEAR = {name: 1.03 if name.startswith(("ec_dit_xl_", "gshard_xl_")) else 1.02 for name in PRESETS}
"""How near to the search: a sparse XL keeps the microbatch that still divides its batch on four nodes."""


def priced(cfg, nodes=None):
    """(what the configuration costs, the best that a search finds), on its own or other nodes."""
    nodes = cfg.cluster.nodes if nodes is None else nodes
    cfg = dataclasses.replace(cfg, cluster=dataclasses.replace(cfg.cluster, nodes=nodes))
    world, counted = nodes * cfg.cluster.gpus_per_node, parameters.count(cfg)
    return cost(cfg, counted, layout.resolve(cfg, world=world)), search.best(cfg, counted, world=world)


@pytest.mark.parametrize(
    "name", [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in PRESETS]
)
def test_no_search_finds_a_faster_layout(cfg_of, name):
    cfg = cfg_of(name)
    validate(cfg, world=cfg.cluster.nodes * cfg.cluster.gpus_per_node)
    ours, best = priced(cfg)
    assert ours.memory.total <= search.HEADROOM * cfg.cluster.gpu_memory
    words = " ".join(search.overrides(cfg, best.layout))
    assert ours.step_time.seconds <= NEAR[name] * best.step_time.seconds, f"{name}: {words}"


@pytest.mark.parametrize("name", PAPER)
def test_forty_percent(cfg_of, name):
    cfg = cfg_of(name)
    world = cfg.cluster.nodes * cfg.cluster.gpus_per_node
    assert cfg.train.global_batch == 4096
    assert cost(cfg, parameters.count(cfg), layout.resolve(cfg, world=world)).step_time.mfu >= 0.40


ON_128 = {
    "ec_dit_3xl_32e": ("parallel.ep=32", "parallel.reshard_after_forward=none", "parallel.exchange=hierarchical",
                       "parallel.dp_replicate=2", "train.microbatch=32"),
    "ec_dit_m_64e": ("parallel=ep64", "train.microbatch=32"),
}  # fmt: skip
"""Words beside a preset on 16 nodes; docs/how-to/choose-a-layout.md shows them."""


@pytest.mark.parametrize("name", ON_128)
def test_large_presets_on_128(cfg_of, name):
    cfg = cfg_of(name, *ON_128[name])
    validate(cfg, world=128)
    ours, best = priced(cfg, nodes=16)
    assert ours.step_time.mfu >= 0.40
    assert ours.step_time.seconds <= 1.02 * best.step_time.seconds, search.overrides(cfg, best.layout)
    page = Path(__file__).parents[3] / "docs/how-to/choose-a-layout.md"
    command = f"experiment={name} cluster.nodes=16 {' '.join(ON_128[name])}"
    assert command in " ".join(page.read_text(encoding="utf-8").replace("\\\n", " ").split())


@pytest.mark.parametrize("name", PAPER)
def test_encoders_are_offline_and_counted(cfg_of, name):
    """Table 1's totals do not depend on where the encoders run."""
    cfg = cfg_of(name)
    assert cfg.encoders.text.stored
    assert cfg.encoders.image.stored
    assert parameters.count(cfg).encoders == 704_000_000

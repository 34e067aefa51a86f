"""Parameter counts: exact differences, the documented block, and Table 1 within its 1 % (facts: experts carry no
biases, half of the layers are sparse, the printed totals include about 704M of frozen encoders)."""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest
import torch

from ecdit_train.config.compose import compose
from ecdit_train.config.schema import RunConfig
from ecdit_train.model.dit import DiT
from ecdit_train.model.moe import MoE

ENCODERS = 704_000_000
ROWS = {  # experiment -> (total, activated) as printed, in billions
    "dense_xl": (1.47, None),
    "ec_dit_xl_8e": (2.51, 1.62),
    "ec_dit_xl_16e": (3.70, 1.62),
    "ec_dit_xl_32e": (6.08, 1.62),
    "dense_xxl": (2.35, None),
    "ec_dit_xxl_8e": (4.87, 2.71),
    "ec_dit_xxl_16e": (7.73, 2.71),
    "ec_dit_xxl_32e": (13.47, 2.71),
    # 3XL activated is left out: dense + one more feed-forward in each of 21 sparse layers is 5.39B, the paper prints
    # 5.18B.
    "dense_3xl": (4.50, None),
    "ec_dit_3xl_8e": (10.74, None),
    "ec_dit_3xl_16e": (17.87, None),
    "ec_dit_3xl_32e": (32.15, None),
    "dense_m": (8.03, None),
    "ec_dit_m_64e": (97.21, 8.27),
}


def config(experiment: str) -> RunConfig:
    return compose([f"experiment={experiment}"], local=False)


def on_meta(cfg: RunConfig) -> DiT:
    with torch.device("meta"):
        return DiT(cfg.model, cfg.moe, channels=cfg.encoders.image.channels, text_features=cfg.encoders.text.width)


@cache
def built(experiment: str) -> DiT:
    return on_meta(config(experiment))


def size(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def activated(experiment: str) -> int:
    """Parameters with f_c experts per sparse layer instead of E."""
    cfg, dit = config(experiment), built(experiment)
    experts = sum(size(block.feed_forward.experts) for block in dit.blocks if isinstance(block.feed_forward, MoE))
    return round(size(dit) - experts * (1 - cfg.moe.router.experts_per_token() / cfg.moe.num_experts))


@pytest.mark.parametrize("experiment", [name for name in ROWS if name.startswith("ec")])
def test_exact_differences_of_a_sparse_model(experiment):
    cfg, dit = config(experiment), built(experiment)
    d, E = cfg.model.width, cfg.moe.num_experts
    dense = on_meta(dataclasses.replace(cfg, moe=config("dense_xl").moe))
    sparse = [n for n, block in enumerate(dit.blocks, start=1) if isinstance(block.feed_forward, MoE)]
    assert sparse == list(range(2, cfg.model.layers + 1, 2)), "every second layer, the second first"
    assert len(sparse) == cfg.model.layers // 2
    for n in sparse:
        layer = dit.blocks[n - 1].feed_forward
        assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
            "router.weight": (d, E),
            "experts.up": (E, d, 4 * d),
            "experts.down": (E, 4 * d, d),
        }, "no biases"
    assert size(dit) - size(dense) == len(sparse) * ((E - 1) * 8 * d * d + d * E)


@pytest.mark.parametrize("size_name", ["xl", "xxl", "3xl"])
def test_printed_differences(size_name):
    printed = [ROWS[f"ec_dit_{size_name}_{e}e"][0] for e in (8, 16, 32)]
    ours = [size(built(f"ec_dit_{size_name}_{e}e")) / 1e9 for e in (8, 16, 32)]
    for i in range(2):
        assert abs((ours[i + 1] - ours[i]) - (printed[i + 1] - printed[i])) <= 0.0151, "each printed value is rounded"
    total, active = ROWS[f"ec_dit_{size_name}_8e"]
    dense = ROWS[f"dense_{size_name}"][0]
    assert abs((ours[0] - size(built(f"dense_{size_name}")) / 1e9) - (total - dense)) <= 0.0151
    if active is not None:
        assert (
            abs((activated(f"ec_dit_{size_name}_8e") - size(built(f"dense_{size_name}"))) / 1e9 - (active - dense))
            <= 0.0151
        )


def test_printed_difference_of_m():
    difference = (size(built("ec_dit_m_64e")) - activated("ec_dit_m_64e")) / 1e9
    assert abs(difference - (97.21 - 8.27)) <= 0.0101
    assert len(built("dense_m").blocks) == 46
    assert len(built("ec_dit_m_64e").blocks) == 38


@pytest.mark.parametrize("experiment", ROWS)
def test_seventeen_rows_within_one_percent(experiment):
    total, active = ROWS[experiment]
    assert abs((size(built(experiment)) + ENCODERS) / (total * 1e9) - 1) < 0.01
    if active is not None:
        assert abs((activated(experiment) + ENCODERS) / (active * 1e9) - 1) < 0.01


def test_there_are_seventeen_rows():
    assert len(ROWS) + len({active for _, active in ROWS.values() if active is not None}) == 17


@pytest.mark.parametrize("experiment", ["dense_xl", "ec_dit_xxl_8e", "dense_3xl", "dense_m"])
def test_a_block_is_the_documented_one(experiment):
    cfg, block = config(experiment), built(experiment).blocks[0]
    d, kv = cfg.model.width, cfg.model.kv_heads
    assert size(block.feed_forward) == 8 * d * d
    assert size(block.self_attention) == 2 * d * d + 2 * d * 64 * kv
    assert size(block.cross_attention) == 2 * d * d + 2 * 1536 * d
    assert size(block.modulation) == 3 * d * d + 3 * d
    assert size(block.norm_text) == 2 * d
    parts = (block.feed_forward, block.self_attention, block.cross_attention, block.modulation, block.norm_text)
    assert size(block) == sum(map(size, parts))


@pytest.mark.parametrize("experts", [8, 16, 32])
def test_token_choice_has_the_parameters_of_expert_choice(experts):
    gshard = built(f"gshard_xl_{experts}e")
    assert {n: p.shape for n, p in gshard.named_parameters()} == {
        n: p.shape for n, p in built(f"ec_dit_xl_{experts}e").named_parameters()
    }

"""Parameters: integers equal to the closed formula, and Table 1: differences exact, totals within 1 %."""

from __future__ import annotations

import pytest

from ecdit_train.plan import parameters

PRESETS = [f"ec_dit_{size}_{e}e" for size in ("xl", "xxl", "3xl") for e in (8, 16, 32)] + [
    "dense_xl",
    "dense_xxl",
    "dense_3xl",
    "dense_m",
    "ec_dit_m_64e",
    "gshard_xl_8e",
    "gshard_xxl_32e",
    "shapes_tiny",
    "shapes_small",
]


def closed_form(cfg):
    """Every part by hand, from the shapes in the paper and the choices in docs/explanation/model.md."""
    m, E, d, Y = cfg.model, cfg.moe.num_experts, cfg.model.width, cfg.model.text_width
    q, kv = 64 * m.heads, 64 * m.kv_heads
    values = m.patch**2 * cfg.encoders.image.channels
    sparse = 0 if cfg.moe.router is None else m.layers // 2
    ffn = 2 * m.ffn_ratio * d * d
    refiner = 4 * Y * Y + 8 * Y * Y + 4 * Y
    return {
        "embedding": (values * d + d) + (256 * d + d + d * d + d) + (Y * d + d),
        "text": cfg.encoders.text.width * Y + Y + Y + m.text_refiner_layers * refiner + 2 * Y,
        "self_attention": m.layers * (2 * d * q + 2 * d * kv),
        "cross_attention": m.layers * (2 * d * q + 2 * Y * q + 2 * d),
        "dense_feed_forward": (m.layers - sparse) * ffn,
        "experts": sparse * E * ffn,
        "shared_experts": 0,
        "router": sparse * d * E,
        "modulation": m.layers * (3 * d * d + 3 * d) + 6 * d * d + 6 * d + 2 * d * d + 2 * d,
        "final": d * values + values,
    }


@pytest.mark.parametrize("name", PRESETS)
def test_counts_equal_the_closed_form(cfg_of, name):
    cfg = cfg_of(name)
    counted = parameters.count(cfg)
    assert counted.by_part == closed_form(cfg)
    p = counted
    assert p.network == (
        p.root
        + p.dense_blocks * p.dense_per_block
        + p.sparse_blocks * (p.sparse_per_block + p.router_per_block + p.experts_per_block)
    )


@pytest.mark.parametrize("name", [n for n in PRESETS if n.startswith(("ec_dit", "dense"))])
def test_every_row_of_table_1_within_one_percent(cfg_of, name):
    cfg = cfg_of(name)
    p = parameters.count(cfg)
    row = parameters.table1(cfg, p)
    assert abs(row.total_deviation) < 0.01
    if row.note is None:
        assert abs(row.activated_deviation) < 0.01
    else:
        assert row.row.startswith("3XL")


@pytest.mark.parametrize(
    ("size", "low", "high"),
    [("xl", 8, 16), ("xl", 16, 32), ("xxl", 8, 16), ("xxl", 16, 32), ("3xl", 8, 16), ("3xl", 16, 32)],
)
def test_differences_between_rows_match_the_printed_ones(cfg_of, size, low, high):
    total = {e: parameters.count(cfg_of(f"ec_dit_{size}_{e}e")).total for e in (low, high)}
    printed = {e: parameters.PRINTED[size.upper(), e][0] for e in (low, high)}
    assert (total[high] - total[low]) / 1e9 == pytest.approx(printed[high] - printed[low], abs=0.011)
    d, layers = cfg_of(f"ec_dit_{size}_8e").model.width, cfg_of(f"ec_dit_{size}_8e").model.layers
    assert total[high] - total[low] == (high - low) * layers // 2 * (8 * d * d + d)


@pytest.mark.parametrize("size", ["xl", "xxl"])
def test_activated_minus_dense_is_one_more_feed_forward_per_sparse_layer(cfg_of, size):
    sparse, dense = parameters.count(cfg_of(f"ec_dit_{size}_8e")), parameters.count(cfg_of(f"dense_{size}"))
    printed = parameters.PRINTED[size.upper(), 8][1] - parameters.PRINTED[size.upper(), 0][0]
    assert (sparse.activated - dense.total) / 1e9 == pytest.approx(printed, abs=0.011)


def test_m_64e_total_minus_activated(cfg_of):
    p = parameters.count(cfg_of("ec_dit_m_64e"))
    assert (p.total - p.activated) / 1e9 == pytest.approx(88.94, abs=0.01)
    assert p.network / 1e9 == pytest.approx(96.5, rel=0.01)
    assert p.by_part["experts"] / 1e9 == pytest.approx(91.8, abs=0.05)


def test_encoders_are_inside_the_totals(cfg_of):
    p = parameters.count(cfg_of("ec_dit_xl_8e"))
    assert p.encoders == 704_000_000
    assert p.total == p.network + p.encoders


def test_other_networks_and_routers_have_no_row(cfg_of):
    for words in (
        ("shapes_tiny",),
        ("gshard_xl_8e",),
        ("ec_dit_xl_8e", "moe.num_experts=4"),
        ("dense_m", "model.layers=38"),
    ):
        cfg = cfg_of(*words)
        p = parameters.count(cfg)
        row = parameters.table1(cfg, p)
        assert row is None, words

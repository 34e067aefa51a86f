"""FLOPs: a published-shape estimate under its own assumptions, and what ours adds."""

from __future__ import annotations

import pytest

from ecdit_train.plan import flops

REFERENCE = {"ec_dit_xl_8e": 2.14e15, "ec_dit_xxl_8e": 4.94e15, "ec_dit_3xl_8e": 11.8e15, "ec_dit_m_64e": 19.2e15}
"""T = 4096 * 128 tokens, text 128 x 2048. Cross-attention there has as few key/value heads as self-attention and
reads the 2048-wide text as it is; text refiner, modulations and embeddings are not counted."""


def reference_form(cfg):
    m, d, T = cfg.model, cfg.model.width, cfg.train.global_batch * cfg.tokens_per_image
    q, kv = 64 * m.heads, 64 * m.kv_heads
    attention = 2 * d * q + 2 * d * kv + 2 * d * q + 2 * 2048 * kv + 2 * 2 * 128 * q
    return 6.0 * T * m.layers * (attention + 1.5 * 2 * m.ffn_ratio * d * d)


@pytest.mark.parametrize("name", REFERENCE)
def test_reference_formula_gives_the_reference(cfg_of, name):
    assert reference_form(cfg_of(name)) == pytest.approx(REFERENCE[name], rel=0.005)


@pytest.mark.parametrize(
    ("name", "ratio"),
    [("ec_dit_xl_8e", 1.17), ("ec_dit_xxl_8e", 1.115), ("ec_dit_3xl_8e", 1.08), ("ec_dit_m_64e", 1.05)],
)
def test_ours_differs_by_two_known_terms(cfg_of, name, ratio):
    """Key/value projections of all heads from a 1536-wide text, and the text refiner; the rest is below 0.5 %."""
    cfg = cfg_of(name)
    ours = flops.per_step(cfg, checkpointing="none")
    assert ours.model / REFERENCE[name] == pytest.approx(ratio, abs=0.01)
    m, L = cfg.model, cfg.train.global_batch * 128
    cross = 6.0 * L * m.layers * 2 * 64 * (1536 * m.heads - 2048 * m.kv_heads)
    explained = reference_form(cfg) + cross + ours.by_part["text"]
    assert ours.model / explained == pytest.approx(1.0, abs=0.005)


def test_shares_of_the_parts(cfg_of):
    for name in REFERENCE:
        f = flops.per_step(cfg_of(name), checkpointing="none")
        assert 0.36 < f.by_part["experts"] / f.model < 0.46
        assert f.by_part["router"] / f.model < 0.001
        assert f.by_part["experts"] == 2 * f.by_part["dense_feed_forward"]


def test_recompute_is_the_blocks_forward_and_is_not_model_flops(cfg_of):
    cfg = cfg_of("ec_dit_m_64e")
    none, full = flops.per_step(cfg, checkpointing="none"), flops.per_step(cfg, checkpointing="full")
    assert none.recompute == 0
    assert full.model == none.model
    assert full.recompute == pytest.approx(full.model / 3, rel=0.02)
    assert flops.per_step(cfg, checkpointing="selective").recompute == full.recompute


def test_frozen_encoders_count_only_where_they_run(cfg_of):
    online = flops.per_step(cfg_of("ec_dit_xl_8e", "encoders=paper"), checkpointing="none")
    stored = flops.per_step(cfg_of("ec_dit_xl_8e", "encoders=shards"), checkpointing="none")
    assert stored.frozen_encoders == 0
    assert online.model == stored.model
    per_image = online.frozen_encoders / 4096
    assert per_image == pytest.approx(2 * 670e6 * 128 + 0.27e12, rel=0.01)


def test_counted_by_torch(cfg_of):
    """torch's own counter over one forward and backward of the real network."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from ecdit_train.model.dit import DiT
    from ecdit_train.model.embed import Text

    cfg = cfg_of("shapes_tiny", "train.global_batch=16")
    B, side = 16, cfg.latent_side
    model = DiT(cfg.model, cfg.moe, channels=3, text_features=cfg.encoders.text.width)
    text = Text(
        features_BLX=torch.empty(B, 16, cfg.encoders.text.width),
        mask_BL=torch.ones(B, 16, dtype=torch.bool),
        drop_B=torch.zeros(B, dtype=torch.bool),
    )
    keep = torch.zeros(B, cfg.tokens_per_image, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        out = model(
            torch.empty(B, 3, side, side), t_B=torch.empty(B), text=text, keep_BK=keep, group_tokens=cfg.group_tokens
        )
        out.patches_BKP.sum().backward()
    ours = flops.per_step(cfg, checkpointing="none").model
    # Inputs need no gradient, and recomputed attention scores are torch's business: a few percent.
    assert counter.get_total_flops() == pytest.approx(ours, rel=0.05)

"""Attention, patches, positions, text and modulation, each against its plain definition."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from model_worlds import PATCHES, SIDE, TEXT_TOKENS, fresh, latents, lively, random, text, times

from ecdit_train.model.attention import Attention
from ecdit_train.model.embed import TimestepEmbedding, patchify, sincos_2d, take_tokens, unpatchify


def fill(module: torch.nn.Module, *, seed: int = 3) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return module


@pytest.mark.parametrize(("heads", "kv_heads", "masked"), [(6, 2, False), (6, 6, False), (4, 1, True), (3, 3, True)])
def test_attention_is_the_plain_formula_with_repeated_key_value_heads(heads, kv_heads, masked):
    B, S, T, d, D, Y = 2, 5, 7, 8, 20, 12
    attention = fill(Attention(D, context_width=Y, heads=heads, kv_heads=kv_heads, head_dim=d).double())
    x, context = random(B, S, D), random(B, T, Y, seed=1)
    mask = torch.arange(T) < torch.tensor([[3], [7]]) if masked else None
    q = (x @ attention.query.weight.T).view(B, S, heads, d).transpose(1, 2)
    k, v = (
        (context @ w.T).view(B, T, kv_heads, d).transpose(1, 2).repeat_interleave(heads // kv_heads, dim=1)
        for w in (attention.key.weight, attention.value.weight)
    )
    scores = q @ k.transpose(-1, -2) / math.sqrt(d)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -math.inf)
    expected = (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, S, heads * d) @ attention.out.weight.T
    torch.testing.assert_close(attention(x, context=context, mask_BL=mask), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_patchify_and_unpatchify_are_inverse(patch):
    image = random(2, 3, 8, 8)
    patches = patchify(image, patch=patch)
    assert patches.shape == (2, (8 // patch) ** 2, 3 * patch * patch)
    assert torch.equal(unpatchify(patches, patch=patch, side=8 // patch), image)
    assert torch.equal(patchify(unpatchify(patches, patch=patch, side=8 // patch), patch=patch), patches)


def test_patches_are_in_row_order():
    image = torch.zeros(1, 1, 8, 8)
    image[0, 0, 2, 5] = 1.0  # row 1, column 2 of 4 x 4 patches of 2 x 2
    assert patchify(image, patch=2)[0].any(1).nonzero().flatten().tolist() == [1 * 4 + 2]


def test_take_tokens_keeps_the_named_ones():
    x, keep = random(3, 6, 2), torch.tensor([[0, 5], [1, 2], [3, 4]])
    taken = take_tokens(x, keep)
    for b in range(3):
        assert torch.equal(taken[b], x[b, keep[b]])


def test_positions_tell_rows_from_columns():
    table = sincos_2d(4, 4, 32, device=torch.device("cpu"))
    assert table.shape == (16, 32)
    assert len({tuple(row) for row in table.tolist()}) == 16
    grid = table.view(4, 4, 2, 16)
    assert torch.equal(grid[2, 0, 0], grid[2, 3, 0]), "first half: the row"
    assert torch.equal(grid[0, 3, 1], grid[2, 3, 1]), "second half: the column"
    assert torch.equal(grid[2, 0, 0], grid[0, 2, 1])
    wide = sincos_2d(2, 8, 32, device=torch.device("cpu")).view(2, 8, 2, 16)
    assert torch.equal(wide[:, :4], grid[:2]), "a place is the same in another aspect"


def test_near_timesteps_differ_in_bf16():
    embedding = fill(TimestepEmbedding(32)).to(torch.bfloat16)
    a, b = embedding(torch.tensor([0.5000, 0.5015]))
    assert a.dtype == torch.bfloat16
    assert not torch.equal(a, b)


# --- the whole network ---------------------------------------------------------------------------------------------


def run(dit, x=None, *, t=None, words=None, keep=None, group_tokens=2 * PATCHES):
    return dit(
        latents() if x is None else x,
        t_B=times() if t is None else t,
        text=text() if words is None else words,
        keep_BK=keep,
        group_tokens=group_tokens,
    )


@pytest.mark.parametrize("router", ["dense", "expert_choice", "token_choice"])
def test_at_initialisation_every_block_is_the_identity_and_the_network_says_zero(router):
    dit = fresh(router=router)
    c = dit.condition(times(), text())
    x = random(4, PATCHES, 128)
    for block in dit.blocks:
        assert torch.equal(block(x, c, group_tokens=PATCHES)[0], x)
    assert (run(dit).patches_BKP == 0).all()


def test_at_initialisation_the_output_learns_first_and_then_everything():
    """The zeros let a gradient through: after three plain steps every parameter has moved."""
    dit = fresh()
    before = {name: p.detach().clone() for name, p in dit.named_parameters()}
    optimizer = torch.optim.SGD(dit.parameters(), lr=0.3)
    for _ in range(4):
        optimizer.zero_grad()
        (run(dit, words=text(drop=(1,))).patches_BKP - patchify(latents(seed=5), patch=2)).square().mean().backward()
        optimizer.step()
    still = [name for name, p in dit.named_parameters() if torch.equal(p, before[name])]
    assert still == []


def test_every_input_matters_once_it_lives():
    dit = lively()
    base = run(dit).patches_BKP
    assert base.shape == (4, PATCHES, 12)
    for other in (run(dit, latents(seed=9)), run(dit, t=times().flip(0)), run(dit, words=text(seed=9))):
        assert (other.patches_BKP - base).abs().max() > 1e-3


def test_a_dropped_caption_has_no_influence_bitwise():
    dit = lively()
    words, other = text(drop=(0, 2)), text(seed=9, drop=(0, 2))
    other = replace(other, mask_BL=other.mask_BL.flip(1))
    a, b = (run(dit, words=w, group_tokens=PATCHES).patches_BKP for w in (words, other))
    assert torch.equal(a[[0, 2]], b[[0, 2]])
    assert not torch.equal(a[1], b[1])
    same = latents()[:1].expand(4, -1, -1, -1)
    null = run(dit, same, t=torch.full((4,), 0.5), words=text(drop=(0, 1, 2, 3)), group_tokens=PATCHES).patches_BKP
    torch.testing.assert_close(null, null[:1].expand_as(null), rtol=1e-12, atol=1e-12)


def test_masked_text_tokens_have_no_influence_bitwise():
    dit = lively()
    words = text()
    noisy = torch.where(words.mask_BL[:, :, None], words.features_BLX, 100.0 * random(4, TEXT_TOKENS, 24, seed=8))
    a, b = (run(dit, words=replace(words, features_BLX=f)).patches_BKP for f in (words.features_BLX, noisy))
    assert torch.equal(a, b)


def test_an_empty_caption_is_finite():
    words = text()
    words = replace(words, mask_BL=torch.zeros_like(words.mask_BL))
    assert run(lively(), words=words).patches_BKP.isfinite().all()


def test_assignments_come_first_to_last_and_balance_losses_add_up():
    ours = run(lively(layers=4))
    assert len(ours.assignments) == 2
    assert ours.losses(torch.sum) == {}
    theirs = run(lively(router="token_choice", layers=4))
    first, second = (a.losses["balance"] for a in theirs.assignments)
    torch.testing.assert_close(theirs.losses(torch.sum), {"balance": first + second})
    assert run(lively(router="dense")).assignments == ()


def test_bf16_weights_compute_in_bf16():
    dit = lively().to(torch.bfloat16)
    out = run(dit, latents().float())
    assert out.patches_BKP.dtype == torch.bfloat16
    assert out.patches_BKP.isfinite().all()
    assert out.assignments[0].gate_EGC.dtype == torch.float32


def test_side_of_the_latent_is_free():
    assert run(lively(), random(4, 3, 2 * SIDE, 2 * SIDE), group_tokens=4 * PATCHES).patches_BKP.shape == (
        4,
        4 * PATCHES,
        12,
    )

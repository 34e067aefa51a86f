"""First values: a pure function of (seed, name, box), of the right size, zero where AdaLN-Zero asks for it."""

from __future__ import annotations

import math

import torch
from model_worlds import fresh

from ecdit_train.model.init import initial_values, initialise


def values(name: str, shape: tuple[int, ...], *, seed: int = 0, offsets=None, sizes=None) -> torch.Tensor:
    return initial_values(
        name, seed=seed, global_shape=shape, offsets=offsets or (0,) * len(shape), sizes=sizes or shape
    )


def test_a_box_of_every_parameter_agrees_with_the_whole():
    for name, p in fresh().named_parameters():
        shape = tuple(p.shape)
        whole = values(name, shape)
        torch.testing.assert_close(p.detach().float(), whole)
        offsets, sizes = tuple(n // 3 for n in shape), tuple(n - n // 3 for n in shape)
        box = values(name, shape, offsets=offsets, sizes=sizes)
        assert torch.equal(box, whole[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]), name


def test_one_expert_of_many_is_made_alone():
    shape = (8, 6, 10)
    whole = values("blocks.1.feed_forward.experts.up", shape)
    for e in range(8):
        one = values("blocks.1.feed_forward.experts.up", shape, offsets=(e, 0, 0), sizes=(1, 6, 10))
        assert torch.equal(one[0], whole[e])
    assert not torch.equal(whole[0], whole[1])


def test_names_and_seeds_matter_and_nothing_else():
    name, shape = "blocks.0.self_attention.query.weight", (6, 4)
    first = values(name, shape)
    torch.manual_seed(99)
    assert torch.equal(values(name, shape), first)
    assert not torch.equal(values(name, shape, seed=1), first)
    assert not torch.equal(values("blocks.1.self_attention.query.weight", shape), first)


def test_xavier_bounds_from_the_global_shape():
    whole = values("blocks.0.self_attention.query.weight", (300, 500))
    bound = math.sqrt(6 / 800)
    assert float(whole.abs().max()) < bound
    assert abs(float(whole.std()) - bound / math.sqrt(3)) < 0.01 * bound
    box = values("blocks.0.self_attention.query.weight", (300, 500), offsets=(10, 0), sizes=(2, 500))
    assert float(box.abs().max()) > 0.9 * bound, "a shard is not scaled by its own size"
    stacked = values("blocks.1.feed_forward.experts.up", (4, 300, 500))
    assert abs(float(stacked.std()) - bound / math.sqrt(3)) < 0.01 * bound, "an expert is scaled like a dense layer"


def test_what_starts_at_zero_and_at_one():
    zeros = {n for n, p in fresh().named_parameters() if not p.any()}
    ones = {n for n, p in fresh().named_parameters() if (p == 1).all()}
    names = {n for n, _ in fresh().named_parameters()}
    also = (".bias", "cross_attention.out.weight")
    assert zeros == {n for n in names if n.endswith(also) or "modulation" in n or n == "final.weight"}
    assert ones == {n for n in names if "norm" in n and n.endswith(".weight")}
    assert abs(float(values("text.null", (4096,)).std()) - 0.02) < 0.001


def test_initialise_is_repeatable():
    a, b = fresh(), fresh()
    initialise(b, seed=3)
    assert any(not torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    initialise(b, seed=0)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)

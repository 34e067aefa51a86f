"""Keyed randomness: known answers of Philox, its distributions, and that a draw depends on its key only."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from ecdit_train import keyed
from ecdit_train.kernels import draws
from ecdit_train.keyed import Purpose

ALL = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # Random123, kat_vectors, philox4x32 10
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((ALL, ALL, ALL, ALL), (ALL, ALL), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(counter, key, words):
    assert " ".join(f"{int(w):08x}" for w in keyed.philox(counter, key)) == words


def test_philox_broadcasts_counters():
    rows, cols = torch.arange(3)[:, None], torch.arange(4)[None, :]
    table = torch.stack(keyed.philox((cols, 0, rows, 0), (1, 2)))
    assert table.shape == (4, 3, 4)
    assert int(table.min()) >= 0
    assert int(table.max()) <= ALL
    for r in range(3):
        for c in range(4):
            assert table[:, r, c].tolist() == [int(w) for w in keyed.philox((c, 0, r, 0), (1, 2))]


def positions(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def test_uniform_is_uniform_and_open():
    u = keyed.uniform(7, Purpose.TIMESTEP, torch.arange(200), num=501)
    assert u.shape == (200, 501)
    assert float(u.min()) > 0.0
    assert float(u.max()) < 1.0
    assert stats.kstest(u.flatten().numpy(), "uniform").pvalue > 1e-3
    assert (
        stats.kstest(keyed.uniform(7, Purpose.CAPTION_DROP, torch.arange(20000), num=1)[:, 0].numpy(), "uniform").pvalue
        > 1e-3
    ), "neighbouring positions, one value each"


def test_extreme_words_stay_inside_the_open_interval():
    u = draws.unit(torch.tensor([0, ALL]))
    assert float(u[0]) > 0.0
    assert float(u[1]) < 1.0


def test_normal_is_normal_and_uncorrelated():
    z = keyed.normal(7, Purpose.NOISE, torch.arange(500), shape=(2, 8, 8))
    assert z.shape == (500, 2, 8, 8)
    assert stats.kstest(z.flatten().numpy(), "norm").pvalue > 1e-3
    correlation = torch.corrcoef(z.flatten(1).T) - torch.eye(128)
    assert correlation.abs().max() < 5.5 / math.sqrt(500), "values of one sample"
    correlation = torch.corrcoef(keyed.normal(7, Purpose.NOISE, torch.arange(60), shape=(4000,))) - torch.eye(60)
    assert correlation.abs().max() < 5.5 / math.sqrt(4000), "values of neighbouring samples"


def test_a_draw_depends_on_its_position_only_not_on_the_batch_or_the_number_asked_for():
    p = positions(5, 900, 2**40 + 3, 17)
    whole = keyed.normal(1, Purpose.NOISE, p, shape=(3, 5))
    for i in range(4):
        assert torch.equal(whole[i], keyed.normal(1, Purpose.NOISE, p[i : i + 1], shape=(3, 5))[0])
    assert torch.equal(keyed.uniform(1, Purpose.NOISE, p, num=10), keyed.uniform(1, Purpose.NOISE, p, num=33)[:, :10])
    assert torch.equal(
        keyed.subset(1, Purpose.PATCH_MASK, p, total=16, keep=8)[2:],
        keyed.subset(1, Purpose.PATCH_MASK, p[2:], total=16, keep=8),
    )


def test_seeds_purposes_and_positions_above_32_bits_differ():
    draws = [
        keyed.uniform(seed, purpose, positions(place), num=8)
        for seed in (0, 1, 2**32, 2**33 + 1)
        for purpose in Purpose
        for place in (0, 1, 2**32, 2**32 + 1, 2**47)
    ]
    assert len({tuple(d.flatten().tolist()) for d in draws}) == len(draws)


def test_subset_is_ascending_without_repetition_and_uniform():
    keep = keyed.subset(3, Purpose.PATCH_MASK, torch.arange(4000), total=16, keep=6)
    assert keep.shape == (4000, 6)
    assert keep.dtype == torch.int64
    assert (keep.diff(dim=1) > 0).all()
    assert int(keep.min()) == 0
    assert int(keep.max()) == 15
    counts = torch.bincount(keep.flatten(), minlength=16).double()
    assert (counts / (4000 * 6 / 16) - 1).abs().max() < 0.1
    together = torch.zeros(16, 16).index_put(
        (keep[:, :1].expand(-1, 5), keep[:, 1:]), torch.ones(4000, 5), accumulate=True
    )
    assert together.triu(1).sum() == together.sum()
    assert len({tuple(row) for row in keep.tolist()}) > 2000, "samples have masks of their own"
    assert torch.equal(keyed.subset(3, Purpose.PATCH_MASK, positions(9), total=5, keep=5)[0], torch.arange(5))


def test_no_global_generator_is_read_or_moved():
    before = torch.get_rng_state()
    first = keyed.normal(1, Purpose.NOISE, positions(1, 2), shape=(7,))
    torch.manual_seed(123)
    moved = torch.get_rng_state()
    assert torch.equal(first, keyed.normal(1, Purpose.NOISE, positions(1, 2), shape=(7,)))
    keyed.subset(1, Purpose.PATCH_MASK, positions(1), total=9, keep=4)
    keyed.uniform_box(1, "w", global_shape=(4, 4), offsets=(0, 0), sizes=(4, 4))
    assert torch.equal(torch.get_rng_state(), moved)
    torch.set_rng_state(before)


def boxes(shape: tuple[int, ...]):
    generator = torch.Generator().manual_seed(len(shape))
    for _ in range(25):
        offsets = tuple(int(torch.randint(0, n, (), generator=generator)) for n in shape)
        yield (
            offsets,
            tuple(
                int(torch.randint(0, n - o + 1, (), generator=generator)) for n, o in zip(shape, offsets, strict=True)
            ),
        )


@pytest.mark.parametrize("chunk", [1, 7, 1 << 22])
@pytest.mark.parametrize("shape", [(), (7,), (4, 6), (3, 5, 7), (2, 1, 4, 5)])
def test_boxes_agree_with_the_whole_however_the_work_is_cut(shape, chunk, monkeypatch):
    zeros = (0,) * len(shape)
    whole = keyed.uniform_box(3, "blocks.1.w", global_shape=shape, offsets=zeros, sizes=shape)
    assert whole.shape == shape
    monkeypatch.setattr(keyed, "_CHUNK", chunk)
    for offsets, sizes in [(zeros, shape), *boxes(shape)]:
        box = keyed.uniform_box(3, "blocks.1.w", global_shape=shape, offsets=offsets, sizes=sizes)
        assert box.shape == sizes
        assert torch.equal(box, whole[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))])


def test_a_box_far_inside_a_tensor_of_more_than_2_32_values():
    shape = (64, 12288, 12288)
    box = {"offsets": (63, 12287, 12280), "sizes": (1, 1, 8)}
    values = keyed.uniform_box(3, "w", global_shape=shape, **box)
    assert torch.equal(
        values, keyed.uniform_box(3, "w", global_shape=shape, offsets=(63, 12280, 12280), sizes=(1, 8, 8))[:, 7:]
    )
    assert not torch.equal(
        values, keyed.uniform_box(3, "w", global_shape=shape, offsets=(31, 12287, 12280), sizes=(1, 1, 8))
    )


def test_names_and_seeds_give_different_weights():
    def draw(seed: int, name: str) -> tuple[float, ...]:
        return tuple(keyed.uniform_box(seed, name, global_shape=(9,), offsets=(0,), sizes=(9,)).tolist())

    assert len({draw(0, "a"), draw(1, "a"), draw(0, "b"), draw(2**32, "a")}) == 4

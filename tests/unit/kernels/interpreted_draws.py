"""Keyed draws by their kernel, through Triton's interpreter (test_kernels_interpreted.py runs this file)."""

from __future__ import annotations

import pytest
import torch

from ecdit_train import keyed
from ecdit_train.kernels import draws

POSITIONS = torch.tensor([0, 1, 2**31 + 5, 2**40 + 3, 2**32 - 1])
KEYS = [(0, 0), (0xFFFFFFFF, 0xFFFFFFFF), (0x89ABCDEF, 0x80000001)]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("num", [0, 1, 3, 4, 5, 1029])
def test_uniform_values_are_equal_to_the_last_bit(key, num):
    assert torch.equal(draws.uniform(key, POSITIONS, num=num), draws.uniform_twin(key, POSITIONS, num=num))
    first = torch.tensor([0, 1, 2**33 + 2, 7, 2**34 - 3])
    given = {"num": num, "first_B": first}
    assert torch.equal(draws.uniform(key, POSITIONS, **given), draws.uniform_twin(key, POSITIONS, **given))


@pytest.mark.parametrize("num", [1, 6, 1027])
def test_normal_values_differ_in_their_last_bits_at_most(num):
    for key in KEYS:
        got, expected = (f(key, POSITIONS, num=num) for f in (draws.normal, draws.normal_twin))
        torch.testing.assert_close(got, expected, rtol=4e-7, atol=4e-7)


def test_nothing_to_draw():
    none = torch.empty(0, dtype=torch.int64)
    assert draws.uniform((1, 2), none, num=4).shape == (0, 4)
    assert draws.normal((1, 2), none, num=4).shape == (0, 4)


def test_negative_seeds_and_boxes_of_weights():
    """What the rest of the system asks: by way of `keyed`, whose kernel this is."""
    for seed in (0, 7, -1, 2**63 - 1):
        u = keyed.uniform(seed, keyed.Purpose.NOISE, POSITIONS, num=9)
        key = (seed & 0xFFFFFFFF, ((seed >> 32) ^ (1 * 0x9E3779B9)) & 0xFFFFFFFF)
        assert torch.equal(u, draws.uniform_twin(key, POSITIONS, num=9))
    whole = keyed.uniform_box(3, "w", global_shape=(5, 7), offsets=(0, 0), sizes=(5, 7))
    part = keyed.uniform_box(3, "w", global_shape=(5, 7), offsets=(1, 2), sizes=(3, 4))
    assert torch.equal(whole[1:4, 2:6], part)

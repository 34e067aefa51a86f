"""The order is a permutation per epoch, the same for every world size, well mixed, and cheap at full scale."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import feistel
from data_pipeline.errors import BadSplit
from data_pipeline.order import Order, default_lanes, nearest_divisors


def flat(order: Order, position: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Samples as one number, so that sets of them can be compared."""
    located = order.locate(position)
    assert ((located.sample >= 0) & (located.sample < sizes[located.shard])).all()
    return np.concatenate([[0], np.cumsum(sizes)])[located.shard] + located.sample


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000, 4097])
def test_feistel_permutes_every_size(size: int) -> None:
    image = feistel.permute(np.arange(size), size=size, key=feistel.key(7, size))
    assert sorted(image) == list(range(size))


def test_feistel_takes_a_domain_and_a_key_per_element() -> None:
    size = np.array([5, 9, 1, 700])
    keys = feistel.key(3, np.arange(4))
    together = feistel.permute(np.array([4, 8, 0, 699]), size=size, key=keys)
    alone = [feistel.permute(np.array([s - 1]), size=int(s), key=keys[i : i + 1])[0] for i, s in enumerate(size)]
    assert together.tolist() == alone


def test_feistel_keys_give_unrelated_permutations() -> None:
    a, b = (feistel.permute(np.arange(5000), size=5000, key=feistel.key(1, epoch)) for epoch in (0, 1))
    assert (a == b).sum() < 15  # one fixed match expected
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.06
    assert abs(np.corrcoef(a, np.arange(5000))[0, 1]) < 0.06


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    global_batch=st.integers(1, 24),
    seed=st.integers(0, 2**40),
    window=st.integers(1, 4),
)
def test_an_epoch_visits_no_sample_twice_and_drops_less_than_a_batch(
    sizes: list[int], global_batch: int, seed: int, window: int
) -> None:
    sizes_S = np.array(sizes)
    if sizes_S.sum() < global_batch:
        with pytest.raises(BadSplit):
            Order(sizes_S, seed=seed, global_batch=global_batch)
        return
    order = Order(sizes_S, seed=seed, global_batch=global_batch, window=window)
    assert order.epoch_len + order.dropped_per_epoch == sizes_S.sum()
    assert order.dropped_per_epoch < global_batch
    for epoch in (0, 3):
        seen = flat(order, epoch * order.epoch_len + np.arange(order.epoch_len), sizes_S)
        assert len(set(seen)) == order.epoch_len


def test_order_is_a_function_of_position_alone() -> None:
    """Any slices, in any sequence and across epochs, give what one pass gives: that is resume and world size."""
    sizes = np.full(8, 500)
    position = np.arange(3 * 3968)
    whole = Order(sizes, seed=1, global_batch=64).locate(position)
    for world in (2, 4, 64):
        pieces = Order(sizes, seed=1, global_batch=64)
        share = 64 // world
        for step in (185, 3, 61, 62, 0):
            for rank in range(world):
                slots = step * 64 + rank * share + np.arange(share)
                part = pieces.locate(slots)
                assert (part.shard == whole.shard[slots]).all()
                assert (part.sample == whole.sample[slots]).all()


def test_the_order_is_pinned() -> None:
    """A changed constant would silently reorder every resumed run."""
    located = Order([5, 0, 9, 4], seed=11, global_batch=6).locate(np.array([0, 5, 6, 17, 18, 1000]))
    pairs = list(zip(located.shard.tolist(), located.sample.tolist(), strict=True))
    assert pairs == [(2, 1), (2, 0), (2, 2), (0, 4), (3, 2), (3, 3)]


def test_epochs_and_seeds_differ_and_the_tail_moves() -> None:
    sizes = np.full(4, 25)
    order = Order(sizes, seed=0, global_batch=32)
    epochs = [frozenset(flat(order, e * 96 + np.arange(96), sizes)) for e in range(40)]
    assert len(frozenset.union(*epochs)) == 100
    assert len({frozenset(range(100)) - seen for seen in epochs}) > 20
    other = Order(sizes, seed=1, global_batch=32)
    assert (flat(order, np.arange(96), sizes) != flat(other, np.arange(96), sizes)).any()


@pytest.mark.parametrize(
    ("num_shards", "global_batch", "lanes"), [(8, 64, 8), (7, 64, 4), (1, 64, 1), (120_000, 4096, 1024), (100, 3, 3)]
)
def test_default_lanes(num_shards: int, global_batch: int, lanes: int) -> None:
    assert default_lanes(num_shards, global_batch=global_batch) == lanes


def test_a_batch_mixes_shards_better_than_chance_and_a_rank_reads_few() -> None:
    """Target E9: same-shard pairs of a batch at most 1.1 of ideal, and read amplification at most 1.1."""
    sizes = np.random.default_rng(0).integers(900, 1100, 1024)
    order = Order(sizes, seed=2, global_batch=4096)
    position = np.arange(order.epoch_len)
    shard = order.locate(position).shard.reshape(-1, 4096)
    pairs = []
    for step in (0, 100, 200):
        counts = np.bincount(shard[step], minlength=1024)
        pairs.append((counts * (counts - 1)).sum() / (4096 * 4095))
    assert np.mean(pairs) * 1024 < 1.1
    world, opened = 64, 0
    for rank in range(world):
        opened += len(np.unique(shard[:, rank * 64 : (rank + 1) * 64]))
    assert opened / 1024 < 1.1


def test_order_of_a_billion_samples_is_made_in_a_second() -> None:
    began = time.process_time()
    order = Order(np.full(120_000, 10_000), seed=0, global_batch=4096)
    order.locate(123_456 * 4096 + np.arange(64))
    assert time.process_time() - began < 1.0


def test_substitutes_come_from_the_same_window_and_differ() -> None:
    sizes = np.full(8, 500)
    order = Order(sizes, seed=1, global_batch=64)
    for position in (0, 63, 4000):
        tries = [flat(order, np.array([position]), sizes)[0]]
        for attempt in range(1, 6):
            located = order.locate(np.array([position]), attempt=attempt)
            tries.append(located.shard[0] * 500 + located.sample[0])
        assert len(set(tries)) == 6


def test_refusals_name_the_rule_and_the_nearest_value() -> None:
    with pytest.raises(BadSplit, match="nearest: 4 or 8"):
        Order([100], seed=0, global_batch=64, lanes=5)
    with pytest.raises(BadSplit, match="number of samples, 100"):
        Order([100], seed=0, global_batch=101)
    with pytest.raises(BadSplit, match="seed = -1"):
        Order([100], seed=-1, global_batch=10)
    assert nearest_divisors(64, value=100) == "64"

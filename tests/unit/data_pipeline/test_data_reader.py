"""What a reader keeps at hand is enough for its share of the stream: no index is read twice in an epoch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.order import Order
from data_pipeline.reader import Held, ShardReader, held_for


class Counting:
    """A view that only counts whose index is read."""

    base = ""

    def __init__(self) -> None:
        self.reads: Counter[int] = Counter()

    def load_index(self, shard: int) -> Any:
        self.reads[shard] += 1
        return shard

    def tar(self, shard: int) -> Path:
        raise NotImplementedError


def reads(order: Order, *, world: int, held: Held, prefetch: int) -> list[Counter[int]]:
    """Of each rank over one epoch; `prefetch` steps are read in any order."""
    rng, found = np.random.default_rng(0), []
    for rank in range(world):
        view, share = Counting(), order.global_batch // world
        reader = ShardReader(view, held=held)  # type: ignore[arg-type]
        for first in range(0, order.steps_per_epoch, prefetch):
            steps = np.arange(first, min(first + prefetch, order.steps_per_epoch))
            positions = (steps[:, None] * order.global_batch + rank * share + np.arange(share)).ravel()
            for shard in order.locate(rng.permutation(positions)).shard.tolist():
                reader._index(shard)
        found.append(view.reads)
    return found


@pytest.mark.parametrize(("lanes", "world"), [(32, 1), (256, 1), (1024, 1), (1024, 8), (1024, 64)])
@pytest.mark.parametrize("window", [1, 2, 4])
def test_no_index_is_read_twice(lanes: int, world: int, window: int) -> None:
    sizes = np.random.default_rng(lanes).integers(4, 12, 12 * lanes)
    order = Order(sizes, seed=1, global_batch=max(lanes, 256), lanes=lanes, window=window)
    world = min(world, order.global_batch)
    held = held_for(order.shards_at_once(world=world, steps=3))
    for counts in reads(order, world=world, held=held, prefetch=3)[:4]:
        # A shard at the border of two lanes is met at the end of one and at the beginning of the other.
        assert sum(count - 1 for count in counts.values()) <= lanes // world + 1
        assert max(counts.values()) <= 2
    few = Held(files=held.files, indexes=held.indexes // 5)
    assert sum(reads(order, world=world, held=few, prefetch=3)[0].values()) > len(counts)  # so the test can fail


def test_open_files_stay_below_what_a_process_may_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _: (256, 256))
    held = held_for(5000)
    assert (held.files, held.indexes) == (64, 5000)

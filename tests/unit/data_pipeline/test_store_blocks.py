"""The plan of what is fetched, without a network: whatever the order of events, the budget holds and nobody waits for ever."""

from __future__ import annotations

import random

import pytest

from data_pipeline.store.ahead import Want, _merged
from data_pipeline.store.blocks import Block, Blocks


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("seed", range(40))
def test_every_thread_gets_its_block_within_the_budget(seed: int, keep: bool) -> None:
    """Threads that each read a list of blocks in order, one at a time; answers come in any order, some fail once."""
    rng = random.Random(seed)
    lengths = [rng.randint(1, 9) for _ in range(20)]
    budget, in_flight = rng.randint(1, 30), rng.randint(1, 5)
    blocks = Blocks(budget=budget, in_flight=in_flight, keep=keep)
    todo = [[rng.randrange(20) for _ in range(30)] for _ in range(rng.randint(1, 4))]
    for numbers in zip(*todo, strict=True):
        for number in numbers:
            if rng.random() < 0.8:
                blocks.want(0, start=number, length=lengths[number])
    waits: dict[int, Block] = {}
    under_way: list[Block] = []
    failed = set[int]()
    for _ in range(20_000):
        under_way += blocks.to_start()
        assert len(under_way) <= in_flight
        assert blocks.held <= max(budget, max(lengths))
        assert not (budget >= max(lengths) and blocks.held > budget)
        free = [thread for thread in range(len(todo)) if thread not in waits and todo[thread]]
        ready = [thread for thread, block in waits.items() if block.state == "here"]
        moves = (
            [("demand", t) for t in free]
            + [("take", t) for t in ready]
            + [("answer", n) for n in range(len(under_way))]
        )
        if not moves:
            break
        what, which = rng.choice(moves)
        if what == "demand":
            number = todo[which].pop(0)
            waits[which] = blocks.demand(0, start=number, length=lengths[number])
        elif what == "take":
            block = waits.pop(which)
            blocks.taken(block, num_bytes=rng.randint(0, block.length), wanted=rng.random() < 0.8)
        else:
            block = under_way.pop(which)
            if block.start in failed or rng.random() < 0.9:
                blocks.came(block)
                continue
            failed.add(block.start)
            blocks.failed(block)
            for thread in [t for t, waiting in waits.items() if waiting is block]:  # it meets the error, and asks again
                blocks.taken(waits.pop(thread), num_bytes=0, wanted=False)
                todo[thread].insert(0, block.start)
    assert not waits, "nobody waits for ever"
    assert not any(todo)
    blocks.forget()
    assert blocks.held == sum(block.length for block in blocks._here)


def test_neighbours_are_merged_up_to_a_gap_and_a_size() -> None:
    wants = [Want(shard=1, start=s, length=10) for s in (100, 0, 11, 23, 200)] + [Want(shard=2, start=211, length=5)]
    groups = [[want.start for want in group] for group in _merged(wants, gap=2, most=33)]
    assert groups == [[100], [0, 11, 23], [200], [211]]
    assert [len(group) for group in _merged(wants, gap=2, most=32)] == [1, 2, 1, 1, 1]
    assert [len(group) for group in _merged(wants, gap=-1, most=32)] == [1] * 6

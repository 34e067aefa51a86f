"""Claims save work and decide nothing: one process a shard, a dead one's lease ends, and the bytes are the same."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from preparing_forms import content

from data_pipeline.parts import Part
from data_pipeline.preparing.claims import Claims, claim_path
from data_pipeline.preparing.local import Local
from data_pipeline.preparing.pack import PackRule, pack
from data_pipeline.preparing.sources import find
from data_pipeline.preparing.work import Task

RULE = PackRule(resolution=32)


def task(folder: Path, number: int = 0) -> Task:
    return Task(number=number, output=folder / f"shard-{number:06d}.tar", inputs=())


@pytest.fixture
def two() -> Iterator[tuple[Claims, Claims]]:
    claims = Claims(lease_seconds=0.4), Claims(lease_seconds=0.4)
    yield claims
    for one in claims:
        one.close()


def test_one_has_it(two, tmp_path):
    first, second = two
    assert first.claim(task(tmp_path))
    assert not second.claim(task(tmp_path))
    assert second.claim(task(tmp_path, 1))
    first.release(task(tmp_path))
    assert second.claim(task(tmp_path))
    assert [t.number for t in first.take([task(tmp_path, n) for n in range(3)])] == [2]


def test_a_claim_lives_as_long_as_its_process_and_no_longer(two, tmp_path):
    first, second = two
    assert first.claim(task(tmp_path))
    time.sleep(0.9)  # two leases: it was touched meanwhile
    assert not second.claim(task(tmp_path))
    os.utime(claim_path(task(tmp_path)), (0, 0))
    assert second.claim(task(tmp_path))
    first.close()
    assert [path.name for path in tmp_path.iterdir()] == ["shard-000000.claim"], "it is the other's now"


def test_nothing_is_left_behind(tmp_path):
    claims = Claims()
    for number in range(3):
        claims.claim(task(tmp_path, number))
    claims.close()
    assert list(tmp_path.iterdir()) == []


class Noting(Local):
    """Notes which tasks it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: list[int] = []

    def run(self, work, tasks):
        def noted():
            for one in tasks:
                self.numbers.append(one.number)
                yield one

        return super().run(work, noted())


def test_a_part_does_its_own_first_and_leaves_what_others_are_at(forms, tmp_path):
    source, out = find(forms["files"], per_shard=2), tmp_path / "out"
    other = Claims()
    for number in (3, 9):
        other.claim(Task(number=number, output=out / f"shard-{number:06d}.tar", inputs=()))
    runner = Noting()
    made = pack(source, out, rule=RULE, part=Part(number=1, of=2), runner=runner)
    assert runner.numbers == [0, 2, 4, 6, 8, 7, 5, 1]
    assert made.view is None
    assert len(made.done.records) == 8
    other.close()
    made = pack(source, out, rule=RULE, part=Part(number=2, of=2), runner=runner)
    assert runner.numbers[8:] == [3, 9]
    pack(source, tmp_path / "whole", rule=RULE)
    assert content(out) == content(tmp_path / "whole")

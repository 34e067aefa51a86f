"""A stream from an object store is the stream from the folder, whatever the network does, and each of its events is counted."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from benchmarks.object_server import Answer, Asked, ObjectServer, Rates
from data_pipeline.contract import Batch
from data_pipeline.errors import ChangedShard, CorruptShard, DataError, MissingShard, StoreTrouble
from data_pipeline.loader import StreamingLoader
from data_pipeline.manifest import open_view
from data_pipeline.shapes.make import make_shapes
from data_pipeline.store.ahead import Reading
from data_pipeline.store.patience import Patience
from data_pipeline.store.ranges import Range
from data_pipeline.store.remote import RemoteStore

QUICK = Patience(back_off=0.001, longest_wait=0.01, deadline=60.0, idle=2.0, hedge_after=0)
"""Two seconds are silence on a busy machine, too."""
SMALL = Reading(block=16 << 10, in_flight=8)


@pytest.fixture
def server(shapes_folder: Path) -> Iterator[ObjectServer]:
    with ObjectServer(shapes_folder) as server:
        yield server


OPEN: list[StreamingLoader] = []


@pytest.fixture(autouse=True)
def _leaves_no_thread() -> Iterator[None]:
    before = threads()
    yield
    while OPEN:
        OPEN.pop().close()
    assert threads() <= before


def stream(place: str | Path, **options: object) -> StreamingLoader:
    settings: dict = {
        "global_batch": 32,
        "seed": 3,
        "resolution": 16,
        "threads": 2,
        "patience": QUICK,
        "reading": SMALL,
    }
    OPEN.append(StreamingLoader(open_view(place), **(settings | options)))
    return OPEN[-1]


def take(loader: StreamingLoader, steps: int) -> list[tuple]:
    return [signature(next(loader)) for _ in range(steps)]


def signature(batch: Batch) -> tuple:
    assert batch.images is not None
    return (batch.position.tolist(), batch.keys, batch.captions, batch.images.tobytes())


def threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("ecdit")}


@pytest.mark.parametrize("budget", [2 << 30, 200 << 10, 1])
@pytest.mark.parametrize("threads_", [0, 3])
def test_batches_equal_those_of_the_folder(
    server: ObjectServer, shapes_folder: Path, budget: int, threads_: int
) -> None:
    """Whole blocks, samples alone, and a budget of one range: two epochs each."""
    local, far = (
        stream(shapes_folder),
        stream(server.url, reading=Reading(block=16 << 10, budget=budget), threads=threads_),
    )
    assert take(far, 24) == take(local, 24)
    stats = far.stats()
    assert (stats.read_retries, stats.store_trouble, stats.bytes_read) == (0, {}, stats.bytes_read)
    largest = max(asked.end - asked.start for asked in server.log if asked.end is not None and asked.start is not None)
    assert stats.most_held <= max(budget, largest)
    assert stats.index_reads == 8


def scripted(faults: list[str]) -> Callable[[Asked], Answer]:
    """Each fault once, at a request for a range of its own, from the third range on; everything else is answered."""
    left, met = list(faults), set[tuple]()

    def script(asked: Asked) -> Answer:
        if asked.start is None or not asked.path.endswith(".tar") or asked.number or (asked.path, asked.start) in met:
            return Answer()
        met.add((asked.path, asked.start))
        return Answer(fault=left.pop(0)) if len(met) > 2 and left else Answer()

    return script


KINDS = {
    "503": "http_5xx", "500": "http_5xx", "429": "http_429", "reset": "reset", "reset_body": "reset", "cut_body": "reset",
    "short": "short", "stall": "timeout",
}  # fmt: skip


@pytest.mark.parametrize("budget", [2 << 30, 200 << 10])
def test_every_event_is_counted_and_nothing_is_lost(server: ObjectServer, shapes_folder: Path, budget: int) -> None:
    faults = [*KINDS, *KINDS, "503", "503"]
    server.script = scripted(faults)
    far = stream(server.url, reading=Reading(block=16 << 10, budget=budget))
    local = stream(shapes_folder)
    assert take(far, 12) == take(local, 12)
    stats = far.stats()
    assert dict(stats.store_trouble) == Counter(KINDS[fault] for fault in faults)
    assert stats.read_retries == len(faults)
    assert {fault: server.seen[fault] for fault in set(faults)} == Counter(faults), "each has happened"
    assert stats.bad == {}
    assert (stats.hedged, stats.hedges_won) == (0, 0)


def test_a_range_goes_on_from_the_byte_that_is_missing(server: ObjectServer) -> None:
    server.script = lambda asked: Answer(fault="reset_body" if asked.number == 0 and asked.start == 0 else "", at=0.75)
    big = server.folder / "big.bin"
    content = np.random.default_rng(0).integers(0, 256, 4 << 20, np.uint8).tobytes()
    big.write_bytes(content)
    try:
        store = RemoteStore(server.url, patience=QUICK)
        range_ = Range(path="big.bin", start=0, length=len(content), size=len(content))
        assert store.background.submit(store.fetch(range_)).result() == content
        first, second = [asked for asked in server.log if asked.path == "big.bin"]
        assert (first.start, second.end) == (0, len(content))
        assert 2 << 20 < (second.start or 0) <= 3 << 20
        assert store.counts.bytes == len(content)
        store.close()
    finally:
        big.unlink()


def test_a_slow_request_is_overtaken_by_a_second_one(server: ObjectServer, shapes_folder: Path) -> None:
    """Every eighth range hangs for longer than the test may take."""
    slow = set()

    def script(asked: Asked) -> Answer:
        if asked.start is not None and asked.number == 0 and asked.path.endswith(".tar"):
            slow.add((asked.path, asked.start))
            return Answer(latency=60.0 if len(slow) % 8 == 1 else 0.0)
        return Answer()

    server.script = script
    patience = Patience(hedge_after=0.05, idle=30.0)
    far, local = stream(server.url, patience=patience), stream(shapes_folder)
    assert take(far, 12) == take(local, 12)
    stats = far.stats()
    assert stats.hedged >= stats.hedges_won >= len(slow) // 8
    assert stats.stall_seconds < 30
    assert stats.store_trouble == {}


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        ("503", StoreTrouble, r"bytes \d+ to \d+: failed 9 times, last by http_5xx"),
        ("404", MissingShard, r"is not there"),
        ("403", StoreTrouble, r"access is refused \(403"),
        ("416", StoreTrouble, r"\(416\)"),
        ("whole", StoreTrouble, r"must answer ranges \(206\)"),
        ("other_range", StoreTrouble, r"another range than was asked for"),
        ("changed", ChangedShard, r"was replaced while it was read"),
    ],
)
def test_what_does_not_pass_ends_the_run_where_it_was(
    server: ObjectServer, shapes_folder: Path, fault: str, error: type[Exception], words: str
) -> None:
    """With a name, no sample substituted, and exact state: the next life goes on from there."""
    far = stream(server.url, on_bad="substitute", max_bad=1.0, prefetch=1, reading=Reading(block=16 << 10, budget=1))
    local = stream(shapes_folder)
    assert take(far, 3) == take(local, 3)
    server.script = lambda asked: Answer(fault=fault if asked.start is not None else "")
    with pytest.raises(error, match=words):
        take(far, 12)
    assert far.stats().bad == {}
    state = json.loads(json.dumps(far.state_dict()))
    far.close()
    server.script = lambda asked: Answer()
    again = stream(server.url)
    again.load_state_dict(state)
    local.load_state_dict(state)
    assert take(again, 14) == take(local, 14)


def test_wrong_bytes_are_a_bad_sample_not_a_bad_network(server: ObjectServer) -> None:
    """Content that the checksum refuses, with the right length and version."""
    server.script = lambda asked: Answer(fault="wrong" if asked.path.endswith("3.tar") and asked.start == 0 else "")
    with pytest.raises(CorruptShard, match=r"crc32 of \d+ bytes"):
        take(stream(server.url, reading=Reading(block=16 << 10)), 12)
    far = stream(server.url, on_bad="substitute", max_bad=1.0)
    take(far, 12)
    assert far.stats().bad["CorruptShard"] > 0
    assert far.stats().store_trouble == {}
    far.close()


def test_resuming_in_between_is_exact_under_trouble(server: ObjectServer, shapes_folder: Path) -> None:
    """1 -> 2 -> 4 -> 1 ranks, 5 % of 503 and 3 % of broken connections all the while."""
    server.script = Rates(unavailable=0.05, resets=0.03, seed=4)
    local, state = stream(shapes_folder), None
    straight, found = take(local, 13), []
    for world, steps in ((1, 3), (2, 4), (4, 2), (1, 4)):
        ranks = [stream(server.url, rank=rank, world=world) for rank in range(world)]
        for rank in ranks:
            if state is not None:
                rank.load_state_dict(state)
        for _ in range(steps):
            parts = [signature(next(rank)) for rank in ranks]
            found.append(tuple(list(chain.from_iterable(part[n] for part in parts)) for n in range(3)))
        state = ranks[0].state_dict()
        for rank in ranks:
            rank.close()
    assert [tuple(map(list, step[:3])) for step in straight] == [tuple(map(list, step)) for step in found]
    assert server.seen["503"] > 5
    assert server.seen["reset_body"] > 2


class Counted(bytearray):
    """Bytes that say how many of them live."""

    live = most = 0

    def __init__(self, size: int) -> None:
        super().__init__(size)
        Counted.live += size
        Counted.most = max(Counted.most, Counted.live)

    def __del__(self) -> None:
        Counted.live -= len(self)


@pytest.mark.parametrize("budget", [100 << 10, 1 << 20, 1])
def test_the_budget_holds_also_for_what_really_lives(
    server: ObjectServer, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    """Counted at the memory itself, not where the budget is kept; many threads, blocks larger than the budget among them."""
    Counted.live = Counted.most = 0
    monkeypatch.setattr("data_pipeline.store.ranges.bytearray", Counted, raising=False)
    far = stream(server.url, threads=6, prefetch=4, reading=Reading(block=48 << 10, in_flight=16, budget=budget))
    take(far, 20)
    stats = far.stats()
    far.close()
    indexes = sum(path.stat().st_size for path in server.folder.glob("*.idx"))
    assert 0 < Counted.most <= max(budget, 48 << 10) + indexes
    assert stats.most_held <= max(budget, 48 << 10)
    if budget == 1 << 20:
        assert Counted.most > 500 << 10, "it is made use of"


def test_what_fits_is_fetched_once(server: ObjectServer) -> None:
    far = stream(server.url)
    take(far, 12)
    stats = far.stats()
    assert stats.bytes_fetched <= 1.02 * sum(path.stat().st_size for path in server.folder.glob("shapes*"))
    far.close()


def test_closing_does_not_wait_for_the_network(server: ObjectServer) -> None:
    far = stream(server.url, patience=Patience(idle=60.0))
    server.script = lambda asked: Answer(latency=60.0)
    waiting = threading.Thread(target=lambda: pytest.raises(DataError, next, far), daemon=True)
    waiting.start()
    time.sleep(0.2)
    began = time.monotonic()
    far.close()
    waiting.join(2.0)
    assert time.monotonic() - began < 2.0
    assert not waiting.is_alive()


def test_a_step_that_could_not_start_is_started_again(server: ObjectServer, shapes_folder: Path) -> None:
    """Under its own positions with its own samples: memory that was not there, and without threads a sample that was bad once."""
    left = [False] * 5 + [True] + [False] * 4 + [True]

    def allocate(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        if left and left.pop(0):
            raise MemoryError
        return np.empty(shape, dtype)

    wanted = take(stream(shapes_folder), 12)
    assert _take_through(stream(server.url, allocate=allocate), 12, MemoryError) == (wanted, 2)
    far = stream(server.url, threads=0, reading=Reading(block=16 << 10, gap=0, budget=1))
    assert take(far, 3) == wanted[:3]
    server.script = lambda asked: Answer(fault="wrong" if asked.path.endswith(".tar") and asked.start else "")
    with pytest.raises(CorruptShard):
        take(far, 9)
    found = wanted[: far.state_dict()["step"]]
    server.script = lambda asked: Answer()
    rest, _ = _take_through(far, 12 - len(found), CorruptShard)
    assert found + rest == wanted


def _take_through(loader: StreamingLoader, steps: int, error: type[Exception]) -> tuple[list[tuple], int]:
    """Batches, and how often `next` failed."""
    found: list[tuple] = []
    failed = 0
    while len(found) < steps:
        try:
            found += take(loader, 1)
        except error:
            failed += 1
            assert failed < 300
    return found, failed


def test_a_bad_index_is_met_where_it_is_needed_and_substituted_as_in_a_folder(copied_folder: Path) -> None:
    shard = int(stream(copied_folder, lanes=1, window=1).order.locate(np.array([300])).shard[0])
    path = copied_folder / f"shapes-{shard:06}.idx"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with ObjectServer(copied_folder) as server:
        local, far = (
            stream(place, on_bad="substitute", max_bad=1.0, window=4) for place in (copied_folder, server.url)
        )
        assert take(far, 12) == take(local, 12)
        assert far.stats().bad == local.stats().bad == {"CorruptShard": local.stats().bad["CorruptShard"]}
        strict, there = (stream(place, lanes=1, window=1) for place in (copied_folder, server.url))
        whole = 0
        with suppress(CorruptShard):
            for _ in strict:
                whole += 1
        take(there, whole)
        with pytest.raises(CorruptShard, match=rf"index .*{path.name}"):
            next(there)
        assert whole > 1, "not before"


def test_closing_while_indexes_are_under_way_leaves_nothing(tmp_path: Path) -> None:
    make_shapes(tmp_path, count=200, resolution=16, seed=5, samples_per_shard=2)
    with ObjectServer(tmp_path) as server:
        far = stream(server.url, lanes=32, patience=Patience(idle=60.0))
        server.script = lambda asked: Answer(latency=60.0 if asked.path.endswith(".idx") else 0.0)
        met: list[BaseException] = []

        def run() -> None:
            try:
                next(far)
            except BaseException as error:
                met.append(error)

        waiting = threading.Thread(target=run, daemon=True)
        waiting.start()
        while sum(asked.path.endswith(".idx") for asked in server.log) < 10:
            time.sleep(0.01)
        began = time.monotonic()
        far.close()
        waiting.join(5.0)
        assert time.monotonic() - began < 5.0
        assert [type(error) for error in met] == [StoreTrouble]
        with pytest.raises(StoreTrouble, match="closed"):
            next(far)

"""A stream from an object store is the stream from the folder, whatever the network does, and each of its events is counted."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.object_server import ObjectServer
from data_pipeline.contract import Batch
from data_pipeline.loader import StreamingLoader
from data_pipeline.manifest import open_view
from data_pipeline.store.ahead import Reading
from data_pipeline.store.patience import Patience

QUICK = Patience(back_off=0.001, longest_wait=0.01, deadline=20.0, idle=0.3, hedge_after=0)
SMALL = Reading(block=16 << 10, in_flight=8)


@pytest.fixture
def server(shapes_folder: Path) -> Iterator[ObjectServer]:
    with ObjectServer(shapes_folder) as server:
        yield server


def stream(place: str | Path, **options: object) -> StreamingLoader:
    settings: dict = {
        "global_batch": 32,
        "seed": 3,
        "resolution": 16,
        "threads": 2,
        "patience": QUICK,
        "reading": SMALL,
    }
    return StreamingLoader(open_view(place), **(settings | options))


def take(loader: StreamingLoader, steps: int) -> list[tuple]:
    return [signature(next(loader)) for _ in range(steps)]


def signature(batch: Batch) -> tuple:
    assert batch.images is not None
    return (batch.position.tolist(), batch.keys, batch.captions, batch.images.tobytes())


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("ecdit")}


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
    far.close()
    local.close()
    assert not threads()

"""What a reader keeps at hand is enough for its share of the stream, and its short ways find what the long ones find."""

from __future__ import annotations

import errno
import io
import os
import tarfile
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from data_pipeline.catalogue import Catalogue
from data_pipeline.checksum import crc32
from data_pipeline.decode import decode_array
from data_pipeline.errors import BadArray, CorruptShard, DataError, Where
from data_pipeline.loader import StreamingLoader
from data_pipeline.manifest import View
from data_pipeline.order import Order
from data_pipeline.reader import Held, ShardReader, held_for
from data_pipeline.readers import divided, open_reader
from data_pipeline.tar import proven_fields, split_proven_name, walk_proven


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
                reader.index(shard)
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


def members(names: list[str], *, tar_format: int) -> memoryview:
    """A tar's bytes up to its end-of-archive blocks: the range of one sample, and what stands between its members."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tar_format) as tar:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = 10 + 700 * number
            tar.addfile(info, io.BytesIO(bytes([65 + number]) * info.size))
        end = tar.offset
    return memoryview(raw.getvalue())[:end]


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize(
    "names",
    [
        ["a.jpg", "a.txt", "a.latent.npy"],
        ["./b/a.JPG", "./b/a.Latent.Npy"],
        ["a.jpg", "b.txt", "a.txt", "a.b/c.txt"],
        ["a.jpg", "aa.txt", "a/b.txt", "a.x/b.txt"],
        ["k" * 96 + ".jpg", "k" * 96 + ".txt"],
        ["d" * 60 + "/" + "k" * 70 + ".jpg", "d" * 60 + "/" + "k" * 70 + ".txt"],
        ["n" + "é" * 30 + ".jpg", "n" + "é" * 30 + ".json"],
    ],
)
def test_the_short_way_through_headers_finds_what_the_whole_walk_finds(names: list[str], tar_format: int) -> None:
    whole, wanted = members(names, tar_format=tar_format), ("jpg", "latent.npy", "txt")
    key, fields = proven_fields(whole, wanted=wanted, shard="s")
    long_way: dict[str, bytes] = {}
    for member in walk_proven(whole, shard="s"):
        of, field = split_proven_name(member.name)
        if of == key and field in wanted:
            long_way[field] = bytes(whole[member.data : member.data + member.size])
    assert {name: bytes(content) for name, content in fields.items()} == long_way
    assert key == split_proven_name(names[0])[0]
    assert "jpg" in long_way


def test_a_range_that_is_no_sample_is_refused() -> None:
    whole = bytearray(members(["a.jpg", "a.txt"], tar_format=tarfile.USTAR_FORMAT))
    whole[1024:1536] = bytes(512)
    with pytest.raises(CorruptShard, match="no valid tar header at byte 1024"):
        proven_fields(memoryview(whole), wanted=("jpg",), shard="s")
    with pytest.raises(CorruptShard, match="no valid tar header"):
        proven_fields(memoryview(whole)[:515], wanted=("jpg",), shard="s")


def test_a_reused_buffer_changes_no_batch_and_is_one_per_thread(shapes_view: View) -> None:
    fresh, reused = ShardReader(shapes_view), ShardReader(shapes_view, reuse=True)
    first = reused.read(0, sample=0).fields["png"]
    assert bytes(first) == bytes(fresh.read(0, sample=0).fields["png"])
    with ThreadPoolExecutor(1) as pool:
        pool.submit(reused.read, 3, sample=3).result()
    assert bytes(first) == bytes(fresh.read(0, sample=0).fields["png"]), "another thread reads into its own"
    reused.read(3, sample=3)
    assert bytes(first) != bytes(fresh.read(0, sample=0).fields["png"]), "so that this test can fail"


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_every_value_that_is_not_finite_is_found_and_no_other(dtype: type) -> None:
    def decoded(value: float) -> np.ndarray:
        content = io.BytesIO()
        np.save(content, np.array([[[0.0, value, -1.0]]], dtype))
        return decode_array(content.getvalue(), where=Where("s", "k"))

    largest = float(np.finfo(dtype).max)
    for value in (0.0, -0.0, largest, -largest, float(np.finfo(dtype).smallest_subnormal)):
        assert decoded(value).dtype == dtype
    for value in (np.inf, -np.inf, np.nan, -np.nan):
        with pytest.raises(BadArray, match="holds NaN or infinity"):
            decoded(value)


def test_the_checksum_is_that_of_zlib() -> None:
    content = np.random.default_rng(0).integers(0, 256, 100_000, np.uint8).tobytes()
    for size in (0, 1, 7, 64, 4097, 100_000):
        assert crc32(memoryview(content)[:size]) == zlib.crc32(content[:size])


def test_a_thread_that_ends_by_a_mistake_of_ours_ends_the_run_with_a_name(
    shapes_view: View, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not as bad data: nothing is substituted, the state stays at the step that was not delivered."""
    stream = StreamingLoader(
        shapes_view, global_batch=32, seed=3, resolution=16, threads=2, on_bad="substitute", max_bad=1.0
    )
    next(stream)

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("in a decoder")

    monkeypatch.setattr("data_pipeline.assemble.BatchBuffer.fill", broken)
    with pytest.raises(
        DataError, match=r"step \d+: a decoding thread ended with ZeroDivisionError: in a decoder"
    ) as error:
        list(islice(stream, 8))
    assert type(error.value) is DataError
    assert stream.stats().bad == {}
    stream.close()


def test_batches_are_made_in_the_memory_that_was_asked_for(shapes_view: View) -> None:
    made = []

    def allocate(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        made.append(np.full(shape, 77, dtype))
        return made[-1]

    settings: dict = {"global_batch": 32, "seed": 3, "resolution": 16, "threads": 2}
    stream, usual = (
        StreamingLoader(shapes_view, allocate=allocate, **settings),
        StreamingLoader(shapes_view, **settings),
    )
    for _ in range(3):
        batch, wanted = next(stream), next(usual)
        assert any(batch.images is one for one in made)
        np.testing.assert_array_equal(batch.images, wanted.images)
    stream.close()
    usual.close()


def test_files_are_divided_among_the_sources_of_a_mixture(shapes_view: View) -> None:
    def of(shards: int, base: str = "") -> Any:
        return SimpleNamespace(shards=range(shards), base=base)

    views = [of(1000), of(3), of(500), of(800, "s3://b/x")]
    parts = divided(Held(files=64, indexes=700), views=views)
    assert [(part.files, part.indexes) for part in parts if part] == [(31, 700), (3, 3), (30, 500), (1, 700)]
    assert divided(None, views=views) == [None] * 4
    both = open_reader(Catalogue({"a": shapes_view, "b": shapes_view}), held=Held(files=6, indexes=16))
    before = len(os.listdir("/proc/self/fd"))
    for shard in range(16):
        both.read(shard, sample=0)
    assert len(os.listdir("/proc/self/fd")) - before <= 6
    both.close()


def test_too_many_open_files_are_no_missing_shard(shapes_view: View, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    reader = ShardReader(shapes_view)
    reader.read(0, sample=0)
    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    with pytest.raises(DataError, match=r"Too many open files .*raise the limit: ulimit -n$"):
        reader.read(1, sample=0)
    monkeypatch.undo()
    monkeypatch.setattr("os.open", refuse)
    with pytest.raises(DataError, match=r"Too many open files .*raise the limit: ulimit -n$"):
        reader.read(1, sample=0)
    monkeypatch.undo()
    assert reader.read(1, sample=0).key
    reader.close()

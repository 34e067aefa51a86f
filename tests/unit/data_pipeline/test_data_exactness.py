"""Nothing lost, nothing repeated, every bit equal: real ranks killed with SIGKILL at random and resumed on other ranks and threads.

By default a seeded trial of each kind; `-m slow` runs 70 of each.
"""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from exactness_ranks import GLOBAL_BATCH, Stream, Trial, undisturbed, with_take_down

from benchmarks.object_server import ObjectServer, Rates
from data_pipeline.manifest import View, open_view
from data_pipeline.prepare import RawMembers, write_shards
from data_pipeline.sources import Named, SizeNamed
from data_pipeline.taken import write_take_down
from data_pipeline.views import write_keep

STEPS = 40
KINDS = ("one source", "mixture", "view", "take-down", "bad samples", "dali", "stages", "sizes", "store")

multiprocessing.set_forkserver_preload(["exactness_ranks", "webdataset"])


def draw(folder: Path, *, count: int, seed: int) -> View:
    rng = np.random.default_rng(seed)
    samples = [
        RawMembers(
            key=f"{folder.name}-{n:05d}",
            members={
                "jpg": simplejpeg.encode_jpeg(
                    rng.integers(0, 256, (16, 16, 3), np.uint8), quality=90, colorspace="RGB"
                ),
                "txt": f"number {n}".encode(),
            },
        )
        for n in range(count)
    ]
    write_shards(samples, folder, samples_per_shard=23)
    return open_view(folder)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sets, one with damage, and lists of what is kept and taken down."""
    root = tmp_path_factory.mktemp("sets")
    rng = np.random.default_rng(0)
    for seed, (name, count) in enumerate((("a", 300), ("b", 140), ("c", 60), ("bad", 300))):
        view = draw(root / name, count=count, seed=seed)
        write_keep(view, rng.random(count) < 0.6, reason="a draw", out=root / f"{name}.keep")
        for size in range(2):
            mine = np.arange(count) % 3 < 1 if size else np.arange(count) % 3 >= 1
            write_keep(view, mine, reason="a size", out=root / f"{name}-{size}.keep")
        for leg in range(8):
            write_take_down(view, rng.random(count) < 0.04, reason="a draw", out=root / f"{name}-{leg}.down")
    damage(open_view(root / "bad"), rng)
    return root


@pytest.fixture(scope="module")
def served(sets: Path) -> Iterator[str]:
    """The same sets on a web server, which now and then fails."""
    with ObjectServer(sets, script=Rates(unavailable=0.02, resets=0.02)) as server:
        yield server.url


def damage(view: View, rng: np.random.Generator) -> None:
    """Every tenth sample: a byte changed since it was indexed."""
    for shard in range(len(view.shards)):
        index = view.load_index(shard)
        with view.tar(shard).open("r+b") as file:
            for sample in range(0, len(index), 10):
                start, size = index.span(sample)
                place = start + int(rng.integers(size))
                file.seek(place)
                old = file.read(1)
                file.seek(place)
                file.write(bytes([old[0] ^ 0x41]))


def stream_of(kind: str, sets: Path, url: str = "") -> Stream:
    one = (("data", Named(shards=str(sets / "a"))),)
    if kind == "mixture":
        weights = {"a": 5.0, "b": 2.0, "c": 1.5}
        return Stream(sources=tuple((name, Named(shards=str(sets / name), weight=w)) for name, w in weights.items()))
    if kind == "view":
        return Stream(sources=(("data", Named(shards=str(sets / "a"), keep=(str(sets / "a.keep"),))),))
    if kind == "bad samples":
        return Stream(sources=(("data", Named(shards=str(sets / "bad"))),))
    if kind == "sizes":
        sizes = ((0, 16, 16), (1, 8, 24))
        named = ((f"s{n}", SizeNamed(samples=str(sets / f"a-{n}.keep"), height=h, width=w)) for n, h, w in sizes)
        return Stream(sources=one, buckets=tuple(named))
    if kind == "store":
        assert url
        return Stream(sources=(("far", Named(shards=f"{url}/a")), ("near", Named(shards=str(sets / "b")))))
    return Stream(sources=one, decoder="dali" if kind == "dali" else "plain", stages=kind == "stages")


@cache
def wanted(stream: Stream) -> list[int]:
    return undisturbed(stream, steps=STEPS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(1))
def test_trial(kind: str, seed: int, sets: Path, served: str, tmp_path: Path) -> None:
    trial(kind, seed, sets, served, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(100, 172))
def test_many_trials(kind: str, seed: int, sets: Path, served: str, tmp_path: Path) -> None:
    trial(kind, seed, sets, served, tmp_path)


def trial(kind: str, seed: int, sets: Path, url: str, folder: Path) -> None:
    first = stream_of(kind, sets, url)
    run = Trial(stream=first, steps=STEPS, chance=random.Random(f"{kind} {seed}"), folder=folder)
    if kind == "take-down":
        run.change = lambda stream, leg: with_take_down(stream, sets / f"a-{leg % 8}.down") if 0 < leg < 8 else stream
    run.run()
    assert run.kills > 0
    assert sorted(run.found) == list(range(STEPS * GLOBAL_BATCH)), "positions were lost"
    assert run.largest_state <= 1024
    # Up to where something changed the stream is that of before, behind it that of a fresh process that knew it from the start.
    expected, begin = [], 0
    for stream, end in zip(
        [first, *(s for _, s in run.changed_at)], [*(at for at, _ in run.changed_at), STEPS], strict=True
    ):
        expected += wanted(stream)[begin * GLOBAL_BATCH : end * GLOBAL_BATCH]
        begin = end
    assert [run.found[n] for n in range(STEPS * GLOBAL_BATCH)] == expected


def test_a_take_down_changes_only_what_it_takes(sets: Path) -> None:
    """What the trials compare with, looked at itself: a taken sample never comes, and every other place keeps its own."""
    view = open_view(sets / "a")
    before = stream_of("one source", sets)
    after = with_take_down(before, sets / "a-3.down")
    taken = after.data().take_downs.lists[0]
    stream = before.data().stream(seed=before.seed, global_batch=GLOBAL_BATCH)
    located = stream.locate(np.arange(STEPS * GLOBAL_BATCH))
    starts = np.cumsum([0, *view.shard_sizes])
    sizes = view.shard_sizes.tolist()
    mask = np.concatenate(
        [np.unpackbits(taken.of(n).view(np.uint8), bitorder="little")[:size] for n, size in enumerate(sizes)]
    )
    gone = mask[starts[located.shard] + located.sample].astype(bool)
    differ = np.array(wanted(before)) != np.array(wanted(after))
    assert gone.any()
    assert np.array_equal(differ, gone)


def test_a_lost_batch_is_found(sets: Path, tmp_path: Path) -> None:
    """The judge itself: a rank that skips a batch, or a place that is one step off, does not pass."""
    run = Trial(stream=stream_of("one source", sets), steps=STEPS, chance=random.Random(1), folder=tmp_path)
    whole = run._leg

    def forgetful(step: int, state: dict | None) -> tuple[int, dict | None]:
        step, state = whole(step, state)
        return step, state and state | {"step": state["step"] - (0 if step >= STEPS else 1)}

    run._leg = forgetful
    with pytest.raises(AssertionError, match="came twice"):
        run.run()

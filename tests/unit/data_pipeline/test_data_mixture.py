"""Several sources in exact ratios: every source once per its own epoch, whatever ranks, restarts and weights."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.contract import Batch
from data_pipeline.errors import BadSplit, WrongView
from data_pipeline.loader import StreamingLoader
from data_pipeline.manifest import View
from data_pipeline.mixture import Mixture, balanced, shares_of
from data_pipeline.prepare import RawMembers, write_shards
from data_pipeline.sources import DataSet, Source
from data_pipeline.table import Columns, Rows, Shard
from data_pipeline.taken import TakeDowns, write_take_down
from data_pipeline.views import write_keep


def bare(sizes: np.ndarray | list[int], *, name: int = 0) -> View:
    """A view without files."""
    rows = [
        Shard(name=f"{i}.tar", n=int(n), bytes=0, sha256=f"{name:064x}", fields=("txt",)) for i, n in enumerate(sizes)
    ]
    return View(folder=Path(f"/none/{name}"), shards=Rows(Columns.of(rows)), sha256=f"{name:064x}")


def mixed(weights: dict[str, float], sizes: dict[str, list[int] | np.ndarray], **more: object) -> Mixture:
    sources = [Source(name=k, weight=w, view=bare(sizes[k], name=i)) for i, (k, w) in enumerate(weights.items())]
    made = DataSet(sources=tuple(sources)).stream(**{"seed": 5, "global_batch": 32, **more})  # type: ignore[arg-type]
    assert isinstance(made, Mixture)
    return made


def of_source(stream: Mixture, data_shards: list[int], position: np.ndarray) -> np.ndarray:
    """Number of the source of each position, found from the shard."""
    return np.searchsorted(np.cumsum(data_shards), stream.locate(position).shard, side="right")


# --- ratios ----------------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(weights=st.lists(st.integers(1, 60), min_size=1, max_size=9))
def test_the_sequence_is_never_an_entry_off(weights: list[int]) -> None:
    sequence, total = balanced(weights), sum(weights)
    assert np.bincount(sequence, minlength=len(weights)).tolist() == weights
    for i, weight in enumerate(weights):
        counted = np.cumsum(sequence == i) * total
        exact = weight * np.arange(1, total + 1)
        assert (abs(counted - exact) < total).all()


def test_weights_are_taken_as_they_are_written() -> None:
    for weights, global_batch, whole, steps in [
        ((0.7, 0.2, 0.1), 4096, (7, 2, 1), 5),
        ((1, 1, 1), 64, (1, 1, 1), 3),
        ((0.25, 0.75), 64, (1, 3), 1),
        ((3, 9), 64, (1, 3), 1),
        ((0.331, 0.669), 4096, (331, 669), 125),
    ]:
        shares = shares_of(dict(zip("abc", weights, strict=False)), global_batch=global_batch)
        if steps * global_batch <= 1 << 18:
            assert (shares.weights, shares.steps, shares.rounded) == (whole, steps, False)
    for global_batch in (8, 64, 4096, 30_000):
        shares = shares_of({"a": 0.123456789, "b": 0.876543211}, global_batch=global_batch)
        assert shares.rounded
        assert abs(shares.share(0) - 0.123456789) < 1e-4
        assert shares.steps * global_batch <= max(1 << 18, global_batch)
    for bad in ({}, {"a": 0.0, "b": 1.0}, {"a": -1.0}, {"a": float("nan")}, {"a": float("inf"), "b": 1.0}):
        with pytest.raises(BadSplit, match="weights"):
            shares_of(bad, global_batch=8)
    with pytest.raises(BadSplit, match="below one sample"):
        shares_of({"a": 1e-9, "b": 1.0}, global_batch=64)


@pytest.mark.parametrize(
    ("weights", "global_batch"), [((0.7, 0.2, 0.1), 32), ((1, 1, 1), 32), ((0.5, 0.5), 24), ((5, 3), 7), ((0.123457, 1), 16)]
)  # fmt: skip
def test_ratios_are_exact_over_a_cycle_and_nearly_in_a_batch(weights: tuple, global_batch: int) -> None:
    names = "abc"[: len(weights)]
    shards = {"a": [40] * 30, "b": [25] * 20, "c": [11] * 9}
    stream = mixed(dict(zip(names, weights, strict=True)), {n: shards[n] for n in names}, global_batch=global_batch)
    steps = stream.cycle.steps
    source = of_source(stream, [len(shards[n]) for n in names], np.arange(2 * steps * global_batch)).reshape(
        -1, global_batch
    )
    total, shares = sum(stream.cycle.shares.weights), stream.cycle.shares.weights
    counts = np.stack([(source == i).sum(axis=1) for i in range(len(names))], axis=1)
    assert (counts.sum(axis=1) == global_batch).all()
    for half in (counts[:steps], counts[steps:]):
        assert (half.sum(axis=0) * total == np.array(shares) * steps * global_batch).all()
    off = np.abs(counts - global_batch * np.array(shares) / total)
    assert off.max() < 2
    assert (
        np.abs(
            np.cumsum(counts, axis=0) - np.arange(1, 2 * steps + 1)[:, None] * global_batch * np.array(shares) / total
        )
        < 1
    ).all()


# --- coverage --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(25))
def test_each_source_is_seen_once_in_each_epoch_of_its_own(seed: int) -> None:
    rng = np.random.default_rng(seed)
    number = int(rng.integers(2, 5))
    weights = {f"s{i}": float(rng.choice([0.1, 0.2, 1, 3, 0.35])) for i in range(number)}
    sizes = {name: rng.integers(0, 60, int(rng.integers(1, 40))) + (rng.random() < 0.5) for name in weights}
    for name in sizes:
        sizes[name][0] += 3
    global_batch = int(rng.choice([8, 12, 31, 64]))
    stream = mixed(weights, sizes, global_batch=global_batch, seed=seed)
    first = np.cumsum([0, *(len(sizes[name]) for name in stream.cycle.names)])
    wanted_cycles = 1 + max(
        2 * s.epoch_len // n for s, n in zip(stream._streams, stream.cycle.batches, strict=True)
    )  # fmt: skip
    located = stream.locate(np.arange(min(wanted_cycles * stream.cycle.steps, 40_000 // global_batch) * global_batch))
    for i, name in enumerate(stream.cycle.names):
        mine = (located.shard >= first[i]) & (located.shard < first[i + 1])
        ends = np.cumsum(sizes[name])
        shard = located.shard[mine] - first[i]
        assert (located.sample[mine] < sizes[name][shard]).all()
        seen = (ends[shard] - sizes[name][shard]) + located.sample[mine]
        # In the order of the source's own positions: a cycle's numbers go slot by slot.
        cycle, inside = np.divmod(np.arange(len(located.shard))[mine] // global_batch, stream.cycle.steps)
        slot = np.arange(len(located.shard))[mine] % global_batch
        own = cycle * stream.cycle.batches[i] + stream.cycle.number_TB[inside, slot]
        length = stream._streams[i].epoch_len
        whole = (own.max() + 1) // length
        in_order = np.full(own.max() + 1, -1)
        in_order[own] = seen
        for epoch in range(int(whole)):
            part = in_order[epoch * length : (epoch + 1) * length]
            part = part[part >= 0]
            assert len(set(part)) == len(part)
            if (epoch + 1) * length <= cycle.max() * stream.cycle.batches[i]:
                assert len(part) == length
        assert sum(sizes[name]) - length == stream._streams[i].dropped_per_epoch < max(1, stream.cycle.batches[i])
        assert length > 0.93 * sum(sizes[name])


def test_progress_is_arithmetic() -> None:
    stream = mixed({"a": 0.7, "b": 0.2, "c": 0.1}, {"a": [50] * 9, "b": [7] * 3, "c": [30]}, global_batch=16)
    source = of_source(stream, [9, 3, 1], np.arange(200 * 16))
    for step in (0, 1, 7, 50, 199):
        counted = np.bincount(source[: step * 16], minlength=3)
        told = stream.progress(step)
        assert [one.samples for one in told] == counted.tolist()
        assert told[1].epochs == counted[1] / 21  # a small source drops nothing
        assert abs(sum(one.share for one in told) - 1) < 1e-12


def test_substitutes_stay_in_their_source() -> None:
    stream = mixed({"a": 3, "b": 1}, {"a": [50] * 9, "b": [70] * 3})
    position = np.arange(640)
    home = of_source(stream, [9, 3], position)
    for attempt in (1, 2, 15):
        found = stream.locate(position, attempt=attempt)
        assert (np.searchsorted([9, 12], found.shard, side="right") == home).all()
        assert ((found.shard != stream.locate(position).shard) | (found.sample != stream.locate(position).sample)).all()


def test_orders_of_equal_sources_differ_and_the_stream_is_pinned() -> None:
    """A changed constant would silently reorder every resumed run."""
    stream = mixed({"b": 1, "a": 1}, {"a": [50] * 4, "b": [50] * 4}, global_batch=8)
    located = stream.locate(np.arange(400))
    a, b = ([(s % 4, x) for s, x in zip(located.shard, located.sample, strict=True) if s // 4 == i] for i in (0, 1))
    assert a != b
    first = stream.locate(np.array([0, 1, 2, 9, 1000]))
    again = mixed({"a": 1, "b": 1}, {"a": [50] * 4, "b": [50] * 4}, global_batch=8).locate(np.array([0, 1, 2, 9, 1000]))
    assert (first.sample == again.sample).all()  # whichever is named first
    assert list(zip(first.shard.tolist(), first.sample.tolist(), strict=True)) == PINNED


PINNED = [(2, 43), (4, 13), (3, 35), (4, 35), (0, 20)]


# --- lanes -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1, 1), (0.9, 0.09), (0.61803398, 0.3819660)])
def test_a_rank_reads_its_own_lanes_of_every_source(weights: tuple[float, float]) -> None:
    """Read amplification of a mixture, in indexes read: each shard of a large source by one rank, and by its
    neighbours at the edges."""
    rng = np.random.default_rng(0)
    sizes = {"a": rng.integers(900, 1100, 512), "b": rng.integers(900, 1100, 512)}
    stream = mixed(dict(zip("ab", weights, strict=True)), sizes, global_batch=512)
    steps = int(0.9 * 512_000 / 512 / max(w / sum(weights) for w in weights))
    shard = stream.locate(np.arange(steps * 512)).shard.reshape(-1, 512)
    world, opened = 16, 0
    for rank in range(world):
        opened += len(np.unique(shard[:, rank * 32 : (rank + 1) * 32]))
    assert opened / len(np.unique(shard)) < 1.12
    distinct = np.mean([len(np.unique(step)) for step in shard[:: len(shard) // 20]])
    ideal = sum(512 * (1 - (1 - 1 / 512) ** (512 * w / sum(weights))) for w in weights)
    assert distinct > 0.95 * ideal  # a batch mixes as many shards as chance would


# --- the loader ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, View]:
    made = {}
    for name, count, size in (("art", 150, 20), ("photos", 420, 30), ("tiny", 9, 5)):
        samples = [RawMembers(key=f"{name}{i:04d}", members={"txt": f"{name} {i}".encode()}) for i in range(count)]
        made[name] = write_shards(samples, tmp_path_factory.mktemp(name), samples_per_shard=size)
    return made


WEIGHTS = {"photos": 0.6, "art": 0.3, "tiny": 0.1}


def dataset(folders: dict[str, View], weights: dict[str, float] = WEIGHTS, **more: object) -> DataSet:
    sources = [Source(name=name, view=folders[name], weight=weight) for name, weight in weights.items()]
    return DataSet(sources=tuple(sources), **more)  # type: ignore[arg-type]


def loader(data: DataSet, **more: object) -> StreamingLoader:
    return StreamingLoader(data, **{"global_batch": 16, "seed": 2, "threads": 1, **more})  # type: ignore[arg-type]


def told(batch: Batch) -> list[tuple[int, str, str]]:
    assert batch.captions is not None
    return list(zip(batch.position.tolist(), batch.keys, batch.captions, strict=True))


def test_batches_hold_the_samples_of_their_sources(folders: dict[str, View]) -> None:
    stream = loader(dataset(folders))
    seen = [sample for _ in range(100) for sample in told(next(stream))]
    assert all(key == f"{caption.split()[0]}{int(caption.split()[1]):04d}" for _, key, caption in seen)
    counts = Counter(caption.split()[0] for *_, caption in seen)
    assert counts == {"photos": 960, "art": 480, "tiny": 160}
    stats = stream.stats()
    assert {one.name: one.samples for one in stats.sources} == dict(counts)
    assert next(one.epochs for one in stats.sources if one.name == "tiny") == 160 / 9
    stream.close()


@pytest.mark.parametrize("seed", range(10))
def test_batches_are_equal_over_ranks_threads_restarts(folders: dict[str, View], seed: int) -> None:
    """{1, 2, 4, 8} ranks x stops at random, with keeps, take-downs and threads."""
    rng = np.random.default_rng(seed)
    data = dataset(folders)
    if seed % 2:
        out = Path(folders["art"].folder)
        mask = rng.random(150) < 0.6
        keep = write_keep(folders["art"], mask, reason="", out=out / f"{seed}.keep")
        gone = rng.random(420) < 0.3
        down = write_take_down(folders["photos"], gone, reason="", out=out / f"{seed}.down")
        sources = tuple(
            Source(name=s.name, view=s.view, weight=s.weight, keeps=(keep,) if s.name == "art" else ())
            for s in data.sources
        )
        data = DataSet(sources=sources, take_downs=TakeDowns(lists=(down,)))
    whole = loader(data)
    wanted = [told(next(whole)) for _ in range(60)]
    whole.close()
    got: list = []
    state = None
    while len(got) < 60:
        world, steps = int(rng.choice([1, 2, 4, 8])), int(min(rng.integers(1, 25), 60 - len(got)))
        ranks = [loader(data, rank=r, world=world, threads=int(rng.integers(0, 4))) for r in range(world)]
        for rank in ranks:
            if state is not None:
                rank.load_state_dict(state)
        for _ in range(steps):
            got.append([sample for rank in ranks for sample in told(next(rank))])
        states = [json.loads(json.dumps(rank.state_dict())) for rank in ranks]
        assert all(one == states[0] for one in states)
        assert len(json.dumps(states[0])) <= 1024
        state = states[0]
        for rank in ranks:
            rank.close()
    assert got == wanted


def test_a_mixture_reads_no_index_twice(folders: dict[str, View]) -> None:
    stream = loader(dataset(folders), rank=0, world=2)
    for _ in range(60):
        next(stream)
    assert stream._reader.index_reads <= 8 + 14 + 2 + 1
    stream.close()


def test_other_weights_sources_or_data_are_refused(folders: dict[str, View]) -> None:
    state = loader(dataset(folders)).state_dict()
    assert state["sources"] == {
        "art": [folders["art"].sha256[:12], 3], "photos": [folders["photos"].sha256[:12], 6],
        "tiny": [folders["tiny"].sha256[:12], 1],
    }  # fmt: skip
    for weights in ({**WEIGHTS, "tiny": 0.2}, {"photos": 0.6, "art": 0.3}):
        with pytest.raises(WrongView, match=r"data.sources.*train.init_from"):
            loader(dataset(folders, weights)).load_state_dict(state)
    with pytest.raises(WrongView):
        loader(DataSet.of(folders["photos"])).load_state_dict(state)
    with pytest.raises(WrongView):
        loader(dataset(folders)).load_state_dict(loader(DataSet.of(folders["photos"])).state_dict())
    same = loader(dataset(folders, {"tiny": 1, "photos": 6, "art": 3}))  # the same shares in other words
    same.load_state_dict(state)


def test_state_is_small_for_any_number_of_sources() -> None:
    sources = tuple(Source(name=f"a-source-with-a-name-{i}", view=bare([50], name=i), weight=1) for i in range(64))
    data = DataSet(sources=sources)
    state = {"v": 1, "step": 10**9, **data.stream(seed=1, global_batch=64).identity(), **data.identity(global_batch=64)}
    assert len(json.dumps(state)) < 512
    other = DataSet(sources=(*sources[:-1], Source(name=sources[-1].name, view=bare([50], name=63), weight=2)))
    assert other.identity(global_batch=64)["sources"] != data.identity(global_batch=64)["sources"]


def test_held_out_samples_are_of_each_source_by_weight(folders: dict[str, View]) -> None:
    weights = {"photos": 0.75, "art": 0.25}
    last = loader(dataset(folders, weights), held_out=32, only_held_out=True)
    keys = [key for _ in range(2) for _, key, _ in told(next(last))]
    wanted = {f"art{i:04d}" for i in range(142, 150)} | {f"photos{i:04d}" for i in range(396, 420)}
    assert set(keys) == wanted
    assert [key for _ in range(2) for _, key, _ in told(next(last))] == keys
    rest = loader(dataset(folders, weights), held_out=32)
    seen = {key for _ in range(80) for _, key, _ in told(next(rest))}
    assert not seen & wanted
    with pytest.raises(BadSplit, match="whole global batches"):
        loader(dataset(folders, weights), held_out=33)


def test_messages_name_the_source(folders: dict[str, View]) -> None:
    data = dataset(folders)
    names = [row.name for row in data.view.shards]
    assert names[0].startswith("art/")
    assert names[-1].startswith("tiny/")
    assert data.view.shards[-1:] == [data.view.shards[len(names) - 1]]
    with pytest.raises(BadSplit, match="no sample"):
        mixed({"a": 1, "b": 1}, {"a": [5], "b": [0]})
    with pytest.raises(BadSplit, match="different names"):
        DataSet(sources=(Source(name="a", view=folders["art"]), Source(name="a", view=folders["tiny"])))
    with pytest.raises(BadSplit, match="lanes"):
        mixed({"a": 1, "b": 1}, {"a": [5], "b": [5]}, lanes=2)

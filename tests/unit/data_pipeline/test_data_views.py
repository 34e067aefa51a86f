"""What is kept of a data set is a data set; what is taken down leaves the order of all others as it was."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.bitmap import Bitmap, counts_of, open_bitmap, samples_of, write_bitmap
from data_pipeline.errors import BadSplit, CorruptShard, DataError, MissingShard, TooManyBad, TruncatedShard, WrongView
from data_pipeline.loader import StreamingLoader
from data_pipeline.manifest import View, open_view, write_manifest
from data_pipeline.order import Order
from data_pipeline.sources import DataSet, Named, Source, open_data
from data_pipeline.table import Shard
from data_pipeline.taken import TakeDowns, write_take_down
from data_pipeline.views import kept, open_keep, write_keep


def bare(folder: Path, sizes: list[int]) -> View:
    """A manifest without tars."""
    folder.mkdir(exist_ok=True)
    rows = [Shard(name=f"{i}.tar", n=n, bytes=0, sha256=f"{i:064x}", fields=("txt",)) for i, n in enumerate(sizes)]
    return write_manifest(folder, shards=rows)


def flat(view: View, located) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(view.shard_sizes)])[located.shard] + located.sample


@pytest.mark.parametrize("seed", range(8))
def test_a_keep_says_what_was_written(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    view = bare(tmp_path, [*rng.choice([0, 1, 63, 64, 65, 128, 300], 12).tolist(), 5])
    masks = [rng.random(view.num_samples) < share for share in (0.7, 0.5)]
    masks[0][-1] = masks[1][-1] = True
    keeps = [write_keep(view, mask, reason="räson", out=tmp_path / f"{i}.keep") for i, mask in enumerate(masks)]
    assert keeps[0].reason == "räson"
    per_shard = [part.sum() for part in np.split(masks[0] & masks[1], np.cumsum(view.shard_sizes)[:-1])]
    both = kept(view, keeps)
    assert both.sizes.tolist() == per_shard
    assert (both.mask() == (masks[0] & masks[1])).all()
    either = counts_of(keeps, op=np.bitwise_or)
    assert either.sum() == (masks[0] | masks[1]).sum()
    shard = np.repeat(np.arange(len(per_shard)), both.sizes)
    number = np.concatenate([np.arange(n) for n in per_shard])
    shuffled = rng.permutation(len(shard))
    sample = both.select(shard[shuffled], number=number[shuffled])
    position = np.concatenate([[0], np.cumsum(view.shard_sizes)])[shard[shuffled]] + sample
    assert sorted(position) == np.flatnonzero(masks[0] & masks[1]).tolist()
    every = np.repeat(np.arange(len(view.shards)), view.shard_sizes)
    inside = np.concatenate([np.arange(n) for n in view.shard_sizes])
    assert (keeps[0].test(every, sample=inside) == masks[0]).all()
    keeps[0].check()
    assert kept(view, keeps[::-1]).sha256 == both.sha256 != kept(view, keeps[:1]).sha256
    parts = np.split(masks[0], np.cumsum(view.shard_sizes)[:-1])
    again = write_keep(view, iter(parts), reason="other words", out=tmp_path / "c.keep")
    assert again.bits_sha256 == keeps[0].bits_sha256


def test_counts_join_over_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.bitmap._BLOCK_WORDS", 3)
    rng = np.random.default_rng(0)
    view = bare(tmp_path, rng.integers(0, 400, 50).tolist())
    masks = [rng.random(view.num_samples) < 0.5 for _ in range(3)]
    keeps = [write_keep(view, mask, reason="", out=tmp_path / f"{i}.keep") for i, mask in enumerate(masks)]
    wanted = [part.sum() for part in np.split(masks[0] & masks[1] & masks[2], np.cumsum(view.shard_sizes)[:-1])]
    assert counts_of(keeps, op=np.bitwise_and).tolist() == wanted


def test_an_order_over_what_is_kept_visits_just_that(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    view = bare(tmp_path, rng.integers(0, 90, 40).tolist())
    mask = rng.random(view.num_samples) < 0.6
    keep = write_keep(view, mask, reason="", out=tmp_path / "a.keep")
    data = DataSet(sources=(Source(name="data", view=view, keeps=(keep,)),))
    stream = data.stream(seed=3, global_batch=16)
    length = stream.steps_per_epoch * 16
    for epoch in (0, 2):
        seen = flat(view, stream.locate(epoch * length + np.arange(length)))
        assert len(set(seen)) == length
        assert mask[seen].all()
    assert mask.sum() - length == stream.dropped_per_epoch < 16
    assert data.sha256 not in (view.sha256, "")
    none = write_keep(view, ~mask, reason="", out=tmp_path / "b.keep")
    with pytest.raises(BadSplit, match="keep no sample"):
        kept(view, [keep, none])


@pytest.mark.parametrize("seed", range(30))
def test_every_changed_byte_of_a_keep_is_found(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    view = bare(tmp_path, [100, 0, 70, 3, 640])
    path = tmp_path / "a.keep"
    keep = write_keep(view, rng.random(813) < 0.5, reason="a filter", out=path)
    raw = bytearray(path.read_bytes())
    at = int(rng.integers(0, len(raw)))
    raw[at] ^= 1 << int(rng.integers(0, 8))
    path.write_bytes(raw)
    with pytest.raises((CorruptShard, WrongView)):
        open_keep(path, view=view).check()
    if at >= len(raw) - keep.words.nbytes:  # a bit: found when its shard is looked at, and only then
        opened = open_keep(path, view=view)
        with pytest.raises(CorruptShard, match="bits of shard number"):
            [opened.of(shard) for shard in range(5)]


def test_keeps_that_are_cut_missing_foreign_or_of_another_kind_are_refused(tmp_path: Path) -> None:
    view = bare(tmp_path, [100, 70])
    mask = np.ones(170, bool)
    path = tmp_path / "a.keep"
    write_keep(view, mask, reason="x", out=path)
    raw = path.read_bytes()
    for cut in (0, 5, 100, 130, len(raw) - 1):
        path.write_bytes(raw[:cut])
        with pytest.raises((TruncatedShard, CorruptShard), match=r"a\.keep"):
            open_keep(path, view=view)
    path.write_bytes(raw + b"\0" * 8)
    with pytest.raises(CorruptShard):
        open_keep(path, view=view)
    path.write_bytes(b"no keep" * 30)
    with pytest.raises(CorruptShard, match="not a list"):
        open_keep(path, view=view)
    with pytest.raises(MissingShard, match="ecdit data keep"):
        open_keep(tmp_path / "none.keep", view=view)
    path.write_bytes(raw)
    with pytest.raises(WrongView, match=r"belongs to data\.keep"):
        open_bitmap(path, kind="takedown", view=view)
    other = bare(tmp_path / "other", [100, 71])
    with pytest.raises(WrongView, match=f"data.manifest={view.sha256[:12]}"):
        open_keep(path, view=other)
    for wrong in (mask[1:], mask.astype(int), [mask[:100]], [mask[:100], mask[:70], mask[:3]], [mask[:70], mask[:100]]):
        with pytest.raises(BadSplit, match="mask"):
            write_bitmap(path, kind="keep", view=view, masks=wrong, reason="")
    assert path.read_bytes() == raw
    assert not list(tmp_path.glob("*.part-*"))


# --- take-downs ----------------------------------------------------------------------------------------------------------


def taken(view: View, out: Path, samples: list[int] | np.ndarray) -> Bitmap:
    mask = np.zeros(view.num_samples, bool)
    mask[samples] = True
    return write_take_down(view, mask, reason="asked to", out=out)


@pytest.mark.parametrize("seed", range(12))
def test_a_take_down_changes_its_own_positions_and_no_other(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    view = bare(tmp_path, rng.integers(20, 60, 16).tolist())
    keeps = ()
    if seed % 2:
        mask = rng.random(view.num_samples) < 0.8
        keeps = (write_keep(view, mask, reason="", out=tmp_path / "a.keep"),)
    gone = rng.choice(view.num_samples, int(rng.integers(1, view.num_samples // 3)), replace=False)
    if seed % 3 == 0:
        gone = np.unique(np.concatenate([gone, np.arange(200)]))  # whole shards, too
    lists = TakeDowns(lists=(taken(view, tmp_path / "a.down", gone),))
    source = Source(name="data", view=view, keeps=keeps)
    before, after = (
        DataSet(sources=(source,), take_downs=t).stream(seed=1, global_batch=12) for t in (TakeDowns(lists=()), lists)
    )
    position = np.arange(3 * before.steps_per_epoch * 12)
    a, b = before.locate(position), after.locate(position)
    was, now = flat(view, a), flat(view, b)
    assert not np.isin(now, gone).any()
    assert ((was != now) == np.isin(was, gone)).all()
    assert (b.passed_over == np.isin(was, gone)).all()
    pieces = [after.locate(np.array([p])) for p in position[:: len(position) // 50]]  # alone as with others
    assert [flat(view, p)[0] for p in pieces] == now[:: len(position) // 50].tolist()
    if keeps:
        assert mask[now].all()
    for attempt in (1, 3):  # substitutes of bad samples are not taken down either, and are the next good candidates
        tries = [flat(view, after.locate(position[:100], attempt=a)) for a in range(attempt + 1)]
        assert not np.isin(np.concatenate(tries), gone).any()
        untouched = ~np.isin(
            [flat(view, before.locate(position[:100], attempt=a)) for a in range(attempt + 1)], gone
        ).any(0)
        assert (tries[-1] == flat(view, before.locate(position[:100], attempt=attempt)))[untouched].all()


def test_a_set_that_is_taken_down_whole_ends_with_a_name(tmp_path: Path) -> None:
    view = bare(tmp_path, [30, 30])
    lists = TakeDowns(lists=(taken(view, tmp_path / "all.down", np.arange(60)),))
    stream = DataSet(sources=(Source(name="data", view=view),), take_downs=lists).stream(seed=1, global_batch=12)
    with pytest.raises(TooManyBad, match=r"all\.down"):
        stream.locate(np.arange(3))


def test_a_run_resumes_through_more_taken_down_and_never_through_less(
    shapes_view: View, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    a = str(taken(shapes_view, tmp_path / "a.down", np.arange(0, 400, 9)).path)
    b = str(taken(shapes_view, tmp_path / "b.down", np.arange(0, 400, 5)).path)

    def loader(*lists: str, **more: Any) -> StreamingLoader:
        data = open_data({"data": Named(shards=str(shapes_view.folder))}, take_down=lists)
        return StreamingLoader(data, global_batch=40, resolution=16, seed=1, **more)

    whole = loader()
    keys = [next(whole).keys for _ in range(30)]
    state = {0: loader().state_dict()}
    run = loader()
    seen = [next(run).keys for _ in range(4)]
    assert run.state_dict() == {**state[0], "step": 4}  # without lists, the state is what it has always been
    run2 = loader(a)
    run2.load_state_dict(run.state_dict())
    assert caplog.text.count("from step") == 1
    assert "from step 4 on, 45 samples of 1 lists are taken down (before: 0 of 0)" in caplog.text
    assert run2.state_dict()["taken"] == {"lists": 1, "n": 45, "sha": run2.state_dict()["taken"]["sha"], "since": 4}
    seen += [next(run2).keys for _ in range(5)]
    assert run2.stats().passed_over > 0
    halves = [loader(a, b, rank=rank, world=2) for rank in range(2)]
    for half in halves:
        half.load_state_dict(json.loads(json.dumps(run2.state_dict())))
    assert caplog.text.count("from step 9 on") == 1  # one rank says it
    states = [half.state_dict() for half in halves]
    assert states[0] == states[1]
    assert states[0]["taken"]["since"] == 9
    assert states[0]["taken"]["n"] == len({*range(0, 400, 9), *range(0, 400, 5)})
    seen += [next(halves[0]).keys + next(halves[1]).keys for _ in range(21)]
    gone = [set(), {f"{i:08d}" for i in range(0, 400, 9)}, {f"{i:08d}" for i in (*range(0, 400, 9), *range(0, 400, 5))}]
    for step in range(30):
        down = gone[(step >= 4) + (step >= 9)]
        for was, now in zip(keys[step], seen[step], strict=True):
            assert (was != now) == (was in down)
            assert now not in down
    last = halves[0].state_dict()
    same = loader(a, b)
    same.load_state_dict(last)
    assert same.state_dict() == last
    for fewer in ((), (a,), (b,), (b, a)):
        with pytest.raises(WrongView, match="name all lists of before"):
            loader(*fewer).load_state_dict(last)
    assert len(json.dumps(last)) < 1024


def test_a_take_down_of_another_data_set_is_refused(shapes_view: View, tmp_path: Path) -> None:
    other = bare(tmp_path / "other", [5, 6])
    down = taken(other, tmp_path / "x.down", [1])
    with pytest.raises(WrongView, match=other.sha256[:12]):
        open_data({"data": Named(shards=str(shapes_view.folder))}, take_down=[str(down.path)])


def test_a_kept_run_resumes_on_itself_alone(shapes_view: View, tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    files = [tmp_path / "a.keep", tmp_path / "b.keep"]
    for path in files:
        write_keep(shapes_view, rng.random(400) < 0.7, reason="", out=path)

    def loader(*keep: Path, **more: Any) -> StreamingLoader:
        data = open_data({"data": Named(shards=str(shapes_view.folder), keep=[str(k) for k in keep])})
        return StreamingLoader(data, global_batch=16, resolution=16, **more)

    straight = loader(*files)
    wanted = [next(straight).keys for _ in range(20)]
    mask = kept(shapes_view, files).mask()
    assert {int(key) for keys in wanted for key in keys} <= set(np.flatnonzero(mask).tolist())
    first = loader(*files)
    got = [next(first).keys for _ in range(7)]
    halves = [loader(*files[::-1], rank=rank, world=2) for rank in range(2)]
    for half in halves:
        half.load_state_dict(first.state_dict())
    got += [next(halves[0]).keys + next(halves[1]).keys for _ in range(13)]
    assert got == wanted
    with pytest.raises(WrongView, match=r"data\.keep"):
        loader(files[0]).load_state_dict(first.state_dict())
    with pytest.raises(DataError):
        loader().load_state_dict(first.state_dict())


def test_held_out_samples_are_the_last_kept_ones(shapes_view: View, tmp_path: Path) -> None:
    mask = np.arange(400) % 3 != 0
    keep = write_keep(shapes_view, mask, reason="", out=tmp_path / "a.keep")
    data = DataSet(sources=(Source(name="data", view=shapes_view, keeps=(keep,)),))
    last = data.stream(seed=0, global_batch=16, held_out=32, only_held_out=True)
    out = flat(shapes_view, last.locate(np.arange(32)))
    assert out.tolist() == np.flatnonzero(mask)[-32:].tolist()
    rest = data.stream(seed=0, global_batch=16, held_out=32)
    seen = flat(shapes_view, rest.locate(np.arange(rest.steps_per_epoch * 16)))
    assert not set(seen) & set(out)
    assert isinstance(Order([5], seed=0, global_batch=1).hop, int)
    assert samples_of(np.array([0b1001], "<u8")).tolist() == [0, 3]
    assert open_view(shapes_view.folder).sha256 == shapes_view.sha256

"""A set that has grown or was edited since a run began: what changed is named, and what may be done works."""

import json
import shutil
from pathlib import Path

import pytest

from data_pipeline import keys, manifest, stats
from data_pipeline.errors import BadMember, BadSplit, CorruptShard, DataError, MissingShard, WrongView
from data_pipeline.history import changes
from data_pipeline.indexing import index_folder
from data_pipeline.loader import StreamingLoader
from data_pipeline.manifest import HISTORY, MANIFEST, View, open_view, read_manifest
from data_pipeline.shapes.make import make_shapes
from data_pipeline.sources import Named, open_data


def loader(folder: Path, which: str | None = None) -> StreamingLoader:
    data = open_data({"data": Named(shards=str(folder), manifest=which)})
    return StreamingLoader(data, global_batch=32, resolution=16, seed=1, threads=1)


def take(stream: StreamingLoader, steps: int) -> list[tuple[str, ...]]:
    return [next(stream).keys for _ in range(steps)]


@pytest.fixture
def more_tars(tmp_path: Path) -> list[Path]:
    make_shapes(tmp_path / "more", count=60, resolution=16, seed=9, samples_per_shard=30)
    return sorted((tmp_path / "more").glob("*.tar"))


@pytest.mark.parametrize("readable", [10_000, 0])
def test_a_run_goes_on_exactly_on_a_set_that_has_grown(
    copied_folder: Path, more_tars: list[Path], monkeypatch: pytest.MonkeyPatch, readable: int
) -> None:
    monkeypatch.setattr(manifest, "READABLE", readable)
    index_folder(copied_folder, again=True)
    if readable == 0:
        manifest.write_manifest(copied_folder, shards=list(read_manifest(copied_folder).shards))
    first = loader(copied_folder)
    wanted = take(first, 20)
    run = loader(copied_folder)
    got, state = take(run, 7), run.state_dict()
    for number, tar in enumerate(more_tars):
        shutil.copy(tar, copied_folder / f"later-{number}.tar")
    grown = index_folder(copied_folder)
    assert grown.num_samples == 460
    short = state["view_sha256"][:12]
    with pytest.raises(WrongView, match=rf"2 added \(later-0.tar, later-1.tar\).*data.manifest={short} goes on"):
        loader(copied_folder).load_state_dict(state)
    again = loader(copied_folder, short)
    again.load_state_dict(state)
    assert got + take(again, 13) == wanted
    assert len(take(loader(copied_folder), 1)) == 1
    assert open_view(copied_folder, which=grown.sha256[:12]).sha256 == grown.sha256  # the present one, by its name


def test_what_was_edited_or_removed_is_named(copied_folder: Path, more_tars: list[Path]) -> None:
    state = loader(copied_folder).state_dict()
    before = read_manifest(copied_folder)
    names = [row.name for row in before.shards]
    shutil.copy(more_tars[0], copied_folder / names[2])
    (copied_folder / names[5]).unlink()
    (copied_folder / names[5]).with_suffix(".idx").unlink()
    now = index_folder(copied_folder)
    changed = changes(before, now=now)
    assert (changed.added, changed.removed, changed.edited) == ((), (names[5],), (names[2],))
    assert not changed.grown
    with pytest.raises(WrongView) as told:
        loader(copied_folder).load_state_dict(state)
    message = str(told.value)
    assert f"1 removed ({names[5]}), 1 edited ({names[2]})" in message
    assert f"Put back {names[5]}, {names[2]} as they were" in message
    assert "data.manifest=" not in message
    with pytest.raises(DataError, match=names[5]):
        loader(copied_folder, before.sha256[:12])


def test_the_same_set_written_again_leaves_no_history(copied_folder: Path) -> None:
    before = {path.name for path in copied_folder.iterdir()}
    manifest.write_manifest(
        copied_folder, shards=list(read_manifest(copied_folder).shards), meta=read_manifest(copied_folder).meta
    )
    assert {path.name for path in copied_folder.iterdir()} == before


def test_a_manifest_of_earlier_that_is_not_there_or_changed_is_refused(copied_folder: Path) -> None:
    with pytest.raises(MissingShard, match=r"no manifest 0123456789ab .* kept from earlier: none"):
        open_view(copied_folder, which="0123456789ab")
    old = read_manifest(copied_folder)
    manifest.write_manifest(copied_folder, shards=list(old.shards)[:4])
    kept = copied_folder / HISTORY / f"{old.sha256[:12]}.json"
    assert open_view(copied_folder, which=old.sha256).num_samples == 400
    kept.write_bytes(kept.read_bytes() + b" ")
    with pytest.raises(CorruptShard, match="not the manifest that its name says"):
        open_view(copied_folder, which=old.sha256[:12])
    with pytest.raises(MissingShard, match=old.sha256[:12]):
        open_view(copied_folder, which="0123456789ab")
    state = {"view_sha256": old.sha256}
    with pytest.raises(WrongView, match="unchanged copy"):
        loader(copied_folder).load_state_dict({**loader(copied_folder).state_dict(), **state})


def test_a_changed_manifest_of_another_form_is_refused(copied_folder: Path) -> None:
    path = copied_folder / MANIFEST
    content = json.loads(path.read_text())
    for wrong in (
        {"version": 3},
        {"version": 2},
        {"version": 2, "table": []},
        {"version": 2, "table": {"name": 3}},
        {"shards": 5},
    ):
        path.write_text(json.dumps(content | wrong))
        with pytest.raises((CorruptShard, MissingShard)):
            read_manifest(copied_folder)
    path.write_text("[]")
    with pytest.raises(CorruptShard, match="not a manifest"):
        read_manifest(copied_folder)


def test_what_an_epoch_leaves_out_is_said(shapes_view: View, caplog: pytest.LogCaptureFixture) -> None:
    looked = stats.look(shapes_view.folder)
    told = stats.text(looked, global_batch=96)
    assert "4 steps of 96; 16 samples are left out, others in each" in told
    assert "left out" not in stats.text(looked)
    with pytest.raises(BadSplit, match="global batch 401"):
        stats.text(looked, global_batch=401)
    caplog.set_level("INFO", logger="ecdit.data")
    for rank in range(2):
        stream = StreamingLoader(shapes_view, global_batch=96, resolution=16, rank=rank, world=2)
        assert stream.stats().left_out == 16
        stream.close()
    assert caplog.text.count("16 of 400 samples (4.00%) are left out of each epoch") == 1


def test_samples_are_found_by_key(shapes_view: View, tmp_path: Path) -> None:
    names = [row.name for row in shapes_view.shards]
    every = [key for of_shard in keys.keys_by_shard(shapes_view) for key in of_shard]
    assert every == [f"{i:08d}" for i in range(400)]
    found = keys.find(shapes_view, ["00000007", f"{names[1]}\t00000051", f"{names[0]}\t00000052", "nobody"])
    assert found.mask.nonzero()[0].tolist() == [7, 51]
    assert found.unknown == (f"{names[0]}\t00000052", "nobody")
    with pytest.raises(BadMember, match=r"none of 2 keys.*is called '00000000'"):
        keys.find(shapes_view, ["a", "b"])
    (tmp_path / "list").write_bytes(b"a\r\n\nb\n")
    assert keys.read_list(tmp_path / "list") == ["a", "b"]
    for content in (b"", b"\n \n", b"\xff\xfe"):
        (tmp_path / "list").write_bytes(content)
        with pytest.raises(BadMember, match="list"):
            keys.read_list(tmp_path / "list")
    with pytest.raises(MissingShard):
        keys.read_list(tmp_path / "none")

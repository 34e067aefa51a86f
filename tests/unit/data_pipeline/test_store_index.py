"""Tars in a store are indexed, verified and counted where they lie; what a store refuses is one error that says what to set."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.object_server import FAULTS, Answer, ObjectServer
from data_pipeline import keys as keys_of_sets
from data_pipeline.errors import (
    BadMember,
    ChangedShard,
    CorruptShard,
    DataError,
    MissingShard,
    StoreTrouble,
    TruncatedShard,
)
from data_pipeline.history import advice
from data_pipeline.indexing import index_folder, index_tars
from data_pipeline.loader import StreamingLoader
from data_pipeline.manifest import View, open_view, verify, write_manifest
from data_pipeline.stats import look
from data_pipeline.store.credentials import s3_settings
from data_pipeline.store.patience import Hedging, Patience
from data_pipeline.store.place import expanded, open_store
from data_pipeline.store.remote import RemoteStore
from data_pipeline.tars import RemoteTars
from ecdit_train.cli import main

QUICK = Patience(back_off=0.001, longest_wait=0.01, deadline=5.0, idle=0.2, retries=3)


@pytest.fixture
def server(copied_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectServer]:
    """A bucket of plain tars in the folder `set`: no index, no manifest; lists of three names a page."""
    root = copied_folder.parent / "bucket"
    (root / "set").mkdir(parents=True)
    for tar in copied_folder.glob("*.tar"):
        shutil.move(tar, root / "set" / tar.name)
    with ObjectServer(root, page=3) as server:
        for key, value in {
            "AWS_ENDPOINT_URL": server.url, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "here",
        }.items():  # fmt: skip
            monkeypatch.setenv(key, value)
        yield server


def ecdit(words: list[str]) -> int:
    with pytest.raises(SystemExit) as left:
        main(words)
    assert isinstance(left.value.code, int)
    return left.value.code


def keys(view: View) -> list[str]:
    with_ = StreamingLoader(view, global_batch=32, seed=1, resolution=16, threads=2, patience=QUICK)
    found = [key for _ in range(12) for key in next(with_).keys]
    with_.close()
    return found


def test_a_bucket_is_indexed_without_keeping_a_tar(server: ObjectServer, shapes_view: View, tmp_path: Path) -> None:
    out = tmp_path / "indexed"
    assert ecdit(["data", "index", "s3://b/set", "--out", str(out)]) == 0
    assert sorted(path.suffix for path in out.iterdir()) == [".idx"] * 8 + [".json"]
    view = open_view(out)
    assert view.base == "s3://b/set"
    assert view.shards == shapes_view.shards
    assert keys(view) == keys(shapes_view)
    assert verify(out).samples == 400
    assert look(out).samples == 400
    assert ecdit(["data", "verify", str(out)]) == 0
    read = server.seen["bytes"]
    assert ecdit(["data", "index", "s3://b/set", "--out", str(out)]) == 0
    assert server.seen["bytes"] == read, "fresh indexes are kept"
    assert open_view(out).sha256 == view.sha256
    assert index_folder(server.folder / "set").sha256 == view.sha256, "where the tars lie is no part of a set's name"


def test_a_web_server_is_indexed_by_names(server: ObjectServer, shapes_view: View, tmp_path: Path) -> None:
    url = f"{server.url}/set/shapes-{{000000..000007}}.tar"
    assert ecdit(["data", "index", url, "--out", str(tmp_path / "o")]) == 0
    assert keys(open_view(tmp_path / "o")) == keys(shapes_view)
    base, names = expanded(url.replace("..000007", "..000009"))
    with pytest.raises(MissingShard, match=r"has no shapes-000008.tar, shapes-000009.tar$"):
        RemoteTars(open_store(base), folder=tmp_path, names=names)
    with pytest.raises(StoreTrouble, match=r"no list of its files; name the files"):
        RemoteTars(open_store(f"{server.url}/set"), folder=tmp_path)
    with pytest.raises(StoreTrouble, match=r"braces that do not close; must be as .*/\{000..239\}.tar"):
        expanded("https://host/set/{000..239.tar")


def test_manifest_and_indexes_may_lie_at_the_url(shapes_folder: Path, shapes_view: View) -> None:
    with ObjectServer(shapes_folder) as server:
        view = open_view(server.url)
        assert (view.sha256, view.shards) == (shapes_view.sha256, shapes_view.shards)
        assert verify(server.url).samples == 400
        assert look(server.url).samples == 400


def test_a_set_at_a_url_is_checked_as_a_folder_is(server: ObjectServer, tmp_path: Path) -> None:
    out = tmp_path / "o"
    index_tars(out, tars_at=RemoteTars(open_store("s3://b/set"), folder=out))
    first, second, third = sorted((server.folder / "set").iterdir())[:3]
    first.write_bytes(first.read_bytes()[:-10])
    second.unlink()
    with pytest.raises(TruncatedShard, match=r"(?s)000000.tar in s3://b/set has .*000001.tar is missing in s3://b/set"):
        open_view(out)
    with pytest.raises(MissingShard, match=r"no manifest.json at s3://b/set: make one with: ecdit data index"):
        open_view("s3://b/set")
    (out / third.with_suffix(".idx").name).unlink()
    with pytest.raises(DataError, match=r"000002.idx is missing in s3://b/set"):
        open_view(out)


def test_one_byte_that_changed_in_a_bucket_is_found(server: ObjectServer, tmp_path: Path) -> None:
    out = tmp_path / "o"
    index_tars(out, tars_at=RemoteTars(open_store("s3://b/set"), folder=out))
    tar = server.folder / "set" / "shapes-000003.tar"
    raw = bytearray(tar.read_bytes())
    raw[700] ^= 1
    tar.write_bytes(raw)
    with pytest.raises(CorruptShard, match=r"shapes-000003.tar .*crc32 differs in 1 samples"):
        verify(out)


def test_a_damaged_tar_of_a_bucket_is_set_aside(server: ObjectServer, tmp_path: Path, capsys) -> None:
    tar = server.folder / "set" / "shapes-000003.tar"
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    assert ecdit(["data", "index", "s3://b/set", "--out", str(tmp_path / "o")]) == 0
    assert "set aside    shapes-000003.tar: " in capsys.readouterr().out
    assert open_view(tmp_path / "o").num_samples == 350


REFUSED = {
    "403": r"access is refused \(403.*set AWS_ACCESS_KEY_ID",
    "404": r"is not there \(404\)",
    "416": r"\(416\)",
    "no_bucket": r"no such bucket; check the name, AWS_REGION and AWS_ENDPOINT_URL",
    "503": r"failed 4 times, last by http_5xx",
    "500": r"failed 4 times, last by http_5xx",
    "429": r"failed 4 times, last by http_429",
    "reset": r"failed 4 times, last by reset",
    "reset_body": r"failed 4 times, last by reset",
    "cut_body": r"failed 4 times, last by reset",
    "stall": r"failed 4 times, last by timeout",
}


@pytest.mark.parametrize("fault", REFUSED)
def test_every_refusal_is_one_error_with_the_url(server: ObjectServer, fault: str) -> None:
    store = open_store("s3://b/set", patience=QUICK)
    server.script = lambda asked: Answer(fault=fault)
    with pytest.raises(DataError, match=rf"(?s)s3://b/set/shapes-000000.tar.*{REFUSED[fault]}") as caught:
        store.read("shapes-000000.tar")
    assert type(caught.value) is (MissingShard if fault == "404" else StoreTrouble)
    assert set(REFUSED) <= set(FAULTS)
    server.script = lambda asked: Answer()
    assert store.read("shapes-000000.tar"), "it works again as soon as the server does"


def test_a_file_that_changes_under_the_reader_is_refused(server: ObjectServer) -> None:
    store = open_store("s3://b/set", patience=QUICK)
    store.read("shapes-000000.tar")
    server.script = lambda asked: Answer(fault="changed")
    with pytest.raises(
        ChangedShard, match=r"shapes-000000.tar was replaced while it was read: .* bytes, ETag .*; then"
    ):
        store.read("shapes-000000.tar")


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("gs://b/x", r"kind gs://; must be a folder or begin with http://, https://, s3://"),
        ("s3:/b/x", r"no URL; must be as s3://b/x"),
        ("s3:///x", r"names no bucket; must be as s3://BUCKET/folder"),
        ("https://", r"names no host; must be as https://HOST/folder"),
        ("https://me:word@host/set", r"^https://host: names a user or password; set credentials in the environment$"),
    ],
)
def test_a_url_with_a_typo_is_refused_at_once(place: str, words: str) -> None:
    with pytest.raises(StoreTrouble, match=words):
        open_view(place)


def test_credentials_come_from_the_environment_or_the_files_of_the_aws_tools(tmp_path: Path) -> None:
    (tmp_path / "c").write_text(
        "[default]\naws_access_key_id = d\n[work]\naws_access_key_id=w\naws_secret_access_key=s\n"
    )
    (tmp_path / "f").write_text("[profile work]\nregion = eu\nendpoint_url = https://e\n")
    files = {"AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "c"), "AWS_CONFIG_FILE": str(tmp_path / "f")}
    found = s3_settings({**files, "AWS_PROFILE": "work"})
    assert found == {"access_key_id": "w", "secret_access_key": "s", "region": "eu", "endpoint": "https://e"}
    assert s3_settings(files) == {"access_key_id": "d"}
    given = {**files, "AWS_PROFILE": "work", "AWS_ACCESS_KEY_ID": "x", "AWS_REGION": "y", "AWS_ENDPOINT_URL": "z"}
    assert s3_settings(given) == {}, "the environment's own goes first"
    assert s3_settings({**files, "AWS_SKIP_SIGNATURE": "true"}) == {}
    (tmp_path / "c").write_bytes(b"\xff[[")
    assert s3_settings(files) == {}


def test_hedging_learns_what_is_usual_and_stays_rare() -> None:
    hedging = Hedging(None)
    assert hedging.after() is None
    for number in range(200):
        hedging.done(10.0 if number % 50 == 0 else 0.1)
    assert hedging.after() == pytest.approx(0.3)
    hedging.hedged = 29
    assert hedging.after() is None
    assert Hedging(0).after() is None
    assert Hedging(1.5).after() == 1.5


def test_what_lies_in_a_bucket_is_packed_as_if_it_lay_here(
    server: ObjectServer, shapes_folder: Path, tmp_path: Path
) -> None:
    assert ecdit(["data", "index", "s3://b/set", "--out", str(tmp_path / "indexed")]) == 0
    for source, out in ((tmp_path / "indexed", "far"), (shapes_folder, "near")):
        assert ecdit(["data", "pack", str(source), str(tmp_path / out), "resolution=16"]) == 0
    far, near = (sorted((tmp_path / out).glob("*.tar")) for out in ("far", "near"))
    assert [path.name for path in far] == [path.name for path in near]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(far, near, strict=True))


def test_tars_of_the_user_beside_the_indexes_are_left_alone(server: ObjectServer, tmp_path: Path) -> None:
    mine = {tmp_path / "shapes-000000.tar": b"my own", tmp_path / "shapes-000001_stats.json": b"{}"}
    for path, content in mine.items():
        path.write_bytes(content)
    (server.folder / "set" / "shapes-000001_stats.json").write_text('{"successes": 50}')
    view = index_tars(tmp_path, tars_at=RemoteTars(open_store("s3://b/set"), folder=tmp_path)).view
    assert view.num_samples == 400
    assert {path: path.read_bytes() for path in mine} == mine
    made = {path.name for path in tmp_path.iterdir() if path.suffix == ".idx"} | {"manifest.json", "copy", "bucket"}
    assert {path.name for path in tmp_path.iterdir()} - made == {path.name for path in mine}


def test_two_processes_may_index_one_url_into_one_folder(server: ObjectServer, tmp_path: Path) -> None:
    out = tmp_path / "o"
    first, second = (RemoteTars(open_store("s3://b/set"), folder=out) for _ in range(2))
    tar = first.files()[0]
    with first.here(tar) as here:
        assert index_tars(out, tars_at=second, again=True).view.num_samples == 400
        assert here.read_bytes() == (server.folder / "set" / tar.name).read_bytes()
    assert not list(out.glob("*.tally.json"))


def test_what_a_store_or_a_disk_does_is_not_held_against_a_tar(
    server: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, pwrite = tmp_path / "o", os.pwrite
    tars = RemoteTars(open_store("s3://b/set", patience=QUICK), folder=out)
    server.script = lambda asked: Answer(fault="404" if "000003" in asked.path else "")
    with pytest.raises(MissingShard, match=r"000003.tar is not there"):
        index_tars(out, tars_at=tars)
    server.script = lambda asked: Answer()

    def full(fd: int, content: Any, at: int) -> int:
        if at > 20_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(fd, content[:10_000], at)

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(StoreTrouble, match=r"000003.tar cannot be written: No space left on device; the disk of"):
        index_tars(out, tars_at=tars)
    assert not list(out.glob("*.tally.json"))
    monkeypatch.setattr("os.pwrite", lambda fd, content, at: pwrite(fd, content[:10_000], at))
    assert index_tars(out, tars_at=tars).view.num_samples == 400, "a disk may take less than it is given"


def test_a_listing_may_take_longer_than_one_answer_and_goes_on_where_it_failed(server: ObjectServer) -> None:
    (server.folder / "many").mkdir()
    for number in range(150):
        (server.folder / "many" / f"{number:03}").touch()
    script = lambda asked: Answer(latency=0.25, fault="503" if asked.number in (0, 3) else "")  # noqa: E731
    with ObjectServer(server.folder, script=script, page=25) as slow, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", slow.url)
        store = open_store("s3://b/many", patience=replace(QUICK, idle=1.0))
        assert [found.path for found in store.sizes()] == [f"{number:03}" for number in range(150)]
        assert slow.seen["list"] <= 7
        assert slow.seen["503"] == 2


@pytest.mark.parametrize("headers", [2048, 300])
def test_samples_in_a_bucket_are_found_by_key(
    server: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, headers: int
) -> None:
    """With a few bytes of each; where those are too few, with more."""
    out, lines = tmp_path / "o", ["00000007", "shapes-000001.tar\t00000051", "nobody"]
    assert ecdit(["data", "index", "s3://b/set", "--out", str(out)]) == 0
    before = set(threading.enumerate())
    monkeypatch.setattr(keys_of_sets, "_HEADERS", headers)
    monkeypatch.setattr(keys_of_sets, "_BUDGET", 1)
    view = open_view(out)
    assert [key for part in keys_of_sets.keys_by_shard(view) for key in part] == [f"{i:08d}" for i in range(400)]
    found = keys_of_sets.find(view, lines)
    assert found.mask.nonzero()[0].tolist() == [7, 51]
    with pytest.raises(
        BadMember, match=r"none of 1 keys is in s3://b/set: 'nobody'; a sample there is called '00000000'"
    ):
        keys_of_sets.find(view, ["nobody"])
    (tmp_path / "list").write_text("\n".join(lines))
    for verb in ("keep", "takedown"):
        assert ecdit(["data", verb, str(out), "--keys", str(tmp_path / "list"), "--out", str(tmp_path / verb)]) == 0
    assert {thread for thread in threading.enumerate() if thread.name.startswith("ecdit")} <= before


def test_a_manifest_of_earlier_is_found_at_the_url(copied_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_view(copied_folder)
    monkeypatch.setattr("data_pipeline.manifest.READABLE", 5)
    second = write_manifest(copied_folder, shards=list(first.shards)[:6])
    third = write_manifest(copied_folder, shards=list(first.shards)[:7])
    with ObjectServer(copied_folder) as server:
        assert open_view(server.url).sha256 == third.sha256
        assert open_view(server.url, which=third.sha256[:12]).shards == third.shards
        for earlier in (first, second):
            there = open_view(server.url, which=earlier.sha256[:12])
            assert (there.sha256, there.shards) == (earlier.sha256, earlier.shards)
        with pytest.raises(MissingShard, match=rf"no manifest 123456789abc of {server.url}"):
            open_view(server.url, which="123456789abc")
        said = advice(open_view(server.url), wanted_sha256=second.sha256)
        assert f"The shards in {server.url} are not" in said
        assert f"data.manifest={second.sha256[:12]} goes on with those alone" in said


def test_of_files_that_were_read_long_ago_nothing_is_remembered(
    server: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipeline.store.ranges._VERSIONS", 2)
    monkeypatch.setattr("data_pipeline.store.remote._HEADS", 3)
    store = RemoteStore(f"{server.url}/set", patience=QUICK)
    names = [f"shapes-{number:06}.tar" for number in (0, 1, 2, 0, 5, 2)]
    for name in names:
        store.read(name)
    assert list(store.counts.versions) == ["shapes-000005.tar", "shapes-000002.tar"]
    assert [found.path for found in store.sizes([*names, "none"])] == names
    store.close()

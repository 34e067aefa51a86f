"""The index of any WebDataset tar says what a plain reader reads; anything else is counted by reason."""

import io
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import CorruptShard, MissingShard, TruncatedShard
from data_pipeline.index import ABSENT, build_index, index_bytes, index_path, load_index, scan, write_index
from data_pipeline.indexing import index_folder
from data_pipeline.manifest import open_view
from data_pipeline.reader import ShardReader
from data_pipeline.tar import padded


def write_tar(path: Path, members: list[tuple[str, bytes]], *, tar_format: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def read_all(folder: Path) -> dict[str, dict[str, bytes]]:
    view = index_folder(folder)
    reader = ShardReader(view)
    samples = {}
    for shard, row in enumerate(view.shards):
        for sample in range(row.n):
            raw = reader.read(shard, sample=sample)
            samples[raw.key] = {field: bytes(value) for field, value in raw.fields.items()}
    return samples


PAIR = [("0001.png", b"p" * 700), ("0001.txt", b"one"), ("0002.png", b"q" * 512), ("0002.txt", b"two")]


def test_a_foreign_webdataset_tar_reads_as_webdataset_reads_it(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    rng = np.random.default_rng(0)
    with webdataset.TarWriter(str(tmp_path / "foreign-0.tar"), encoder=False) as writer:
        for number in range(40):
            sample = {"__key__": f"a/b{number:04d}", "json": b"{}", "txt": b"c" * number}
            writer.write(sample | {"latent.npy": rng.bytes(int(rng.integers(0, 3000)))})
    theirs = {}
    for sample in webdataset.WebDataset(str(tmp_path / "foreign-0.tar"), shardshuffle=False):
        theirs[sample["__key__"]] = {k: v for k, v in sample.items() if not k.startswith("__")}
    assert read_all(tmp_path) == theirs
    assert len(theirs) == 40


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_and_foreign_names_survive(tmp_path: Path, tar_format: int) -> None:
    """Long names live in another header in each dialect: ustar prefix, pax record, GNU member."""
    folder = "f" * 60
    key = f"{folder}/{'k' * 70}"
    names = [f"{key}.png", f"{key}.txt", "plain.png"]
    if tar_format != tarfile.USTAR_FORMAT:
        names += ["größe.png", f"{'n' * 180}.png"]
    write_tar(tmp_path / "a.tar", [(name, name.encode()) for name in names], tar_format=tar_format)
    got = read_all(tmp_path)
    assert got[key] == {"png": names[0].encode(), "txt": names[1].encode()}
    assert len(got) == len(names) - 1
    assert all(value["png"].decode() == f"{key}.png" for key, value in got.items())


def test_folders_and_leading_dots_are_no_samples(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind, content in [("./sub", tarfile.DIRTYPE, b""), ("./sub/1.txt", tarfile.REGTYPE, b"x")]:
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, len(content)
            tar.addfile(info, io.BytesIO(content))
    assert read_all(tmp_path) == {"sub/1": {"txt": b"x"}}


def test_index_records_and_round_trip(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", [*PAIR, ("0003.txt", b"no picture")])
    index = build_index(tar)
    write_index(index, index_path(tar))
    again = load_index(index_path(tar))
    assert again.fields == index.fields == ("png", "txt")
    assert again.length.tolist() == [[700, 3], [512, 3], [ABSENT, 10]]
    assert (again.tar_sha256, again.tar_bytes, len(again)) == (index.tar_sha256, tar.stat().st_size, 3)
    for sample in range(3):
        offset, size = again.span(sample)
        assert zlib.crc32(tar.read_bytes()[offset : offset + size]) == again.crc[sample]
    assert index_path(tar).stat().st_size == index_bytes(3, fields=("png", "txt"))[0]
    assert 4 * (2 + len(again.fields)) <= 28  # target E13: bytes per sample


def test_an_empty_tar_has_an_empty_index(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", [])
    write_index(build_index(tar), index_path(tar))
    assert len(load_index(index_path(tar))) == 0


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("0001.pyd", "suffix .pyd"),
        ("0001.pkl", "suffix .pkl"),
        ("0001.txt.pickle", "suffix .pickle"),
        ("0001.cls", "suffix .cls"),
        ("README", "no suffix"),
        (".hidden.txt", "hidden file"),
        ("._0001.png", "hidden file"),
        ("../0001.txt", "name that leads outside of its folder"),
        ("a/../../0001.txt", "name that leads outside of its folder"),
        ("/etc/0001.txt", "name that leads outside of its folder"),
        ("a\\0001.txt", "name that leads outside of its folder"),
    ],
)
@pytest.mark.parametrize("place", range(len(PAIR) + 1))
def test_members_nobody_asked_for_are_counted_and_change_nothing(
    tmp_path: Path, name: str, why: str, place: int
) -> None:
    """Wherever they stand, inside of a sample too, where a reader meets them."""
    members = [*PAIR[:place], (name, b"x" * 600), *PAIR[place:]]
    tar = write_tar(tmp_path / "a.tar", members)
    assert scan(tar).found.left_out == {why: 1}
    assert read_all(tmp_path) == {
        "0001": {"png": b"p" * 700, "txt": b"one"},
        "0002": {"png": b"q" * 512, "txt": b"two"},
    }
    assert index_path(tar).stat().st_size in index_bytes(2, fields=("png", "txt"))


def test_what_lies_between_two_samples_is_not_read(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", [*PAIR[:2], ("big.bin", bytes(1 << 20)), *PAIR[2:]])
    index = build_index(tar)
    assert not index.is_dense
    assert sum(index.span(sample)[1] for sample in range(2)) < 8192
    write_index(index, index_path(tar))
    again = load_index(index_path(tar))
    assert [again.span(n) for n in range(2)] == [index.span(n) for n in range(2)]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_left_out(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, plain in (("0001.png", True), ("0001.txt", False), ("0002.png", True)):
            info = tarfile.TarInfo(name)
            if not plain:
                info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    found = scan(tmp_path / "a.tar").found
    assert [(sample.key, set(sample.fields)) for sample in found.samples] == [("0001", {"png"}), ("0002", {"png"})]
    assert [why.partition(" (")[0] for why in found.left_out] == ["no plain file"]


def test_unordered_and_repeated_members_are_rejected(tmp_path: Path) -> None:
    def rejected(*members: str) -> tuple[list[str], dict[str, int]]:
        found = scan(write_tar(tmp_path / "a.tar", [(name, b"x") for name in members])).found
        return [sample.key for sample in found.samples], dict(found.rejected)

    assert rejected("1.png", "2.png", "1.txt", "2.txt", "3.png", "3.txt") == (["3"], {"members apart": 4})
    assert rejected("1.png", "1.PNG", "2.png") == (["2"], {"field png twice": 1})
    assert rejected("1.png", "2.png", "1.png") == (["1", "2"], {"key comes again": 1})


def test_every_cut_of_a_tar_is_noticed_and_counts_whole_samples(tmp_path: Path) -> None:
    members = [(f"{i}.{s}", bytes(600)) for i in range(3) for s in ("png", "txt")]
    content_bytes = write_tar(tmp_path / "a.tar", members).read_bytes()
    per_member = 512 + padded(600)
    content = len(members) * per_member
    for cut in [*range(0, content, 256), content]:
        (tmp_path / "cut.tar").write_bytes(content_bytes[:cut])
        with pytest.raises(TruncatedShard) as caught:
            build_index(tmp_path / "cut.tar")
        # The padding of the last member may be lost without loss of data. A first sample counts once a second began.
        whole = (cut + padded(600) - 600) // (2 * per_member)
        assert caught.value.num_whole == (0 if cut < 2 * per_member + 512 + 600 else whole), cut
        assert f"{caught.value.num_whole} whole samples" in str(caught.value)


def test_a_damaged_header_and_a_missing_file(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", PAIR)
    content = bytearray(tar.read_bytes())
    content[512 + 1024] ^= 1  # the name of the second member
    tar.write_bytes(content)
    with pytest.raises(CorruptShard, match="byte 1536"):
        build_index(tar)
    with pytest.raises(MissingShard, match=r"absent.tar"):
        build_index(tmp_path / "absent.tar")


def test_a_damaged_index_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", PAIR)
    index_folder(tmp_path)
    idx = tmp_path / "a.idx"
    good = idx.read_bytes()
    for number in range(0, len(good), 7):
        bad = bytearray(good)
        bad[number] ^= 0x40
        idx.write_bytes(bad)
        with pytest.raises(CorruptShard):
            open_view(tmp_path).load_index(0)
    idx.write_bytes(good[:-4])
    with pytest.raises(CorruptShard, match="cut or changed"):
        load_index(idx)


def test_indexing_again_keeps_what_is_fresh(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", PAIR)
    first = index_folder(tmp_path)
    written = (tmp_path / "a.idx").stat().st_mtime_ns
    assert index_folder(tmp_path).sha256 == first.sha256
    assert (tmp_path / "a.idx").stat().st_mtime_ns == written
    write_tar(tmp_path / "a.tar", PAIR[:2])
    assert index_folder(tmp_path).num_samples == 1
    with pytest.raises(MissingShard, match=r"no \*\.tar"):
        index_folder(tmp_path / "nowhere")

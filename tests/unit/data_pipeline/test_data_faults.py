"""Damage has a class, an exit code and a place; what may be substituted is, alike on every number of ranks."""

import json
import os
import tarfile
from collections import deque
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import errors
from data_pipeline.errors import (
    BadCaption,
    CorruptShard,
    DataError,
    MissingShard,
    TooManyBad,
    TruncatedShard,
    UndecodableImage,
)
from data_pipeline.index import load_index
from data_pipeline.indexing import index_folder
from data_pipeline.loader import StreamingLoader
from data_pipeline.manifest import MANIFEST, View, open_view, verify
from data_pipeline.prepare import RawMembers, encode_image, write_shards
from data_pipeline.reader import Held, ShardReader


def loader(view: View, **options: object) -> StreamingLoader:
    settings = {"global_batch": 40, "seed": 3, "resolution": 16} | options
    return StreamingLoader(view, **settings)  # type: ignore[arg-type]


def epoch_keys(view: View, *, world: int = 1, steps: int = 10, **options: object) -> list[str]:
    streams = [loader(view, rank=rank, world=world, **options) for rank in range(world)]
    keys = [key for _ in range(steps) for stream in streams for key in next(stream).keys]
    for stream in streams:
        stream.close()
    return keys


def first_error(view: View, **options: object) -> DataError:
    stream = loader(view, **options)
    try:
        with pytest.raises(DataError) as caught:
            deque(islice(stream, stream.steps_per_epoch), maxlen=0)
        return caught.value
    finally:
        stream.close()


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))


def test_every_error_has_an_exit_code_of_its_own() -> None:
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, DataError)]
    codes = {c.__name__: c.exit_code for c in classes}
    assert codes.pop("DataError") == 74
    assert sorted(codes.values()) == list(range(60, 73))
    assert all(c.__doc__ for c in classes)  # `ecdit --help` and the reference show the first line


def test_missing_files_are_all_named_up_front(copied_folder: Path) -> None:
    (copied_folder / "shapes-000002.tar").unlink()
    (copied_folder / "shapes-000005.idx").unlink()
    with pytest.raises(MissingShard) as caught:
        open_view(copied_folder)
    for part in ("shapes-000002.tar", "shapes-000005.idx", str(copied_folder)):
        assert part in str(caught.value)
    (copied_folder / MANIFEST).unlink()
    with pytest.raises(MissingShard, match="ecdit data index"):
        open_view(copied_folder)


def test_a_cut_tar_is_found_up_front(copied_folder: Path) -> None:
    tar = copied_folder / "shapes-000003.tar"
    os.truncate(tar, tar.stat().st_size - 20_000)
    with pytest.raises(TruncatedShard, match=r"shapes-000003.tar in .* has \d+ bytes, must have"):
        open_view(copied_folder)


def test_a_tar_that_shrinks_during_the_run_never_gives_a_half_sample(copied_folder: Path) -> None:
    view = open_view(copied_folder)
    tar = copied_folder / "shapes-000003.tar"
    index = load_index(tar.with_suffix(".idx"))
    os.truncate(tar, index.span(20)[0] + 700)
    reader = ShardReader(view)
    assert reader.read(3, sample=19).key == "00000169"
    with pytest.raises(TruncatedShard, match=r"shapes-000003.tar, key number 20"):
        reader.read(3, sample=20)
    keys = epoch_keys(view, on_bad="substitute", max_bad=0.2)
    assert not {f"{n:08d}" for n in range(170, 200)} & set(keys)
    assert len(keys) == 400


def test_one_flipped_bit_is_found_by_verify_and_by_reading(copied_folder: Path) -> None:
    view = open_view(copied_folder)
    assert verify(copied_folder).samples == 400
    offset, size = view.load_index(1).span(7)
    flip(copied_folder / "shapes-000001.tar", offset + size // 2)
    with pytest.raises(CorruptShard, match=r"shapes-000001.tar in .*: crc32 differs in 1 samples .number 7"):
        verify(copied_folder)
    with pytest.raises(CorruptShard, match=r"shapes-000001.tar, key number 7, position 99: crc32"):
        ShardReader(view).read(1, sample=7, position=99)
    assert isinstance(first_error(view), CorruptShard)


def test_a_flip_in_a_key_or_behind_the_samples_is_found_too(copied_folder: Path) -> None:
    view = open_view(copied_folder)
    tar = copied_folder / "shapes-000000.tar"
    flip(tar, view.load_index(0).span(4)[0] + 3)
    with pytest.raises(CorruptShard):
        ShardReader(view).read(0, sample=4)
    flip(tar, view.load_index(0).span(4)[0] + 3)
    flip(tar, tar.stat().st_size - 5)
    with pytest.raises(CorruptShard, match="sha256 differs"):
        verify(copied_folder)


def test_an_index_of_another_tar_is_refused(copied_folder: Path) -> None:
    (copied_folder / "shapes-000000.idx").write_bytes((copied_folder / "shapes-000001.idx").read_bytes())
    with pytest.raises(CorruptShard, match=r"shapes-000000.tar"):
        open_view(copied_folder).load_index(0)


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"version": 9, "shards": []}', '{"version": 1, "shards": [{"name": "x"}]}']
)
def test_a_broken_manifest_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(CorruptShard, match=r"manifest.json"):
        open_view(tmp_path)


def test_a_manifest_may_not_point_elsewhere(copied_folder: Path) -> None:
    manifest = copied_folder / MANIFEST
    manifest.write_text(manifest.read_text().replace('"shapes-000000.tar"', '"../shapes-000000.tar"'))
    with pytest.raises(CorruptShard, match="leads outside of the folder"):
        open_view(copied_folder)


def make(folder: Path, bad: dict[int, tuple[str, bytes | None]], *, num: int = 200) -> View:
    """A set of which some samples have one member replaced (or taken away)."""
    rng, samples = np.random.default_rng(0), []
    for number in range(num):
        pixels = rng.integers(0, 256, (16, 16, 3)).astype(np.uint8)
        members: dict[str, bytes] = {"png": encode_image(pixels, image_format="png"), "txt": f"{number}".encode()}
        if number in bad:
            name, content = bad[number]
            members.pop(name)
            members |= {} if content is None else {name: content}
        samples.append(RawMembers(key=f"{number:04d}", members=members))
    return write_shards(samples, folder, samples_per_shard=25)


@pytest.mark.parametrize(
    ("member", "content", "kind"),
    [
        ("png", b"garbage", UndecodableImage),
        ("png", None, UndecodableImage),
        ("txt", b"\xff\xfe", BadCaption),
        ("txt", b"", BadCaption),
        ("txt", None, BadCaption),
    ],
)
def test_a_bad_sample_fails_with_shard_key_and_position(
    tmp_path: Path, member: str, content: bytes | None, kind: type
) -> None:
    view = make(tmp_path / "x", {61: (member, content)})
    for threads in (0, 3):
        error = first_error(view, threads=threads)
        assert type(error) is kind
        assert "shard shard-000002.tar, key 0061, position " in str(error)


def test_failing_leaves_the_place_before_the_bad_step(tmp_path: Path) -> None:
    stream = loader(make(tmp_path / "x", {61: ("png", b"garbage")}))
    delivered: list = []
    for _ in range(2):  # the second time raises the same again at once
        with pytest.raises(UndecodableImage):
            delivered.extend(iter(lambda: next(stream).keys, None))
        # `extend` keeps what came before the error.
        assert stream.state_dict()["step"] == len(delivered) == stream.stats().steps < stream.steps_per_epoch
    stream.close()


BAD = {3: ("png", b"x"), 61: ("png", None), 62: ("txt", b"\xff"), 63: ("txt", None), 150: ("png", b"\x89PNG\r\n\x1a\n")}


def test_substitution_keeps_sizes_and_is_the_same_for_any_world_and_threads(tmp_path: Path) -> None:
    view = make(tmp_path / "x", BAD)  # type: ignore[arg-type]
    options = {"on_bad": "substitute", "max_bad": 0.5, "steps": 10}
    one = epoch_keys(view, **options)  # type: ignore[arg-type]
    assert len(one) == 400
    assert not {f"{n:04d}" for n in BAD} & set(one)
    for world, threads in ((1, 0), (2, 3), (4, 1), (8, 2)):
        assert epoch_keys(view, world=world, threads=threads, **options) == one  # type: ignore[arg-type]
    # Only the positions of bad samples differ from what the order names.
    stream = loader(view)
    wanted = stream.order.locate(np.arange(400))
    stream.close()
    planned = [f"{n:04d}" for n in (wanted.shard * 25 + wanted.sample).tolist()]
    assert sum(a != b for a, b in zip(one, planned, strict=True)) == 2 * len(BAD)


def test_substitutes_are_counted_by_class_and_written_to_the_quarantine(tmp_path: Path) -> None:
    view = make(tmp_path / "x", BAD)  # type: ignore[arg-type]
    quarantine = tmp_path / "bad.jsonl"
    stream = loader(view, on_bad="substitute", max_bad=0.5, quarantine=quarantine, prefetch=3)
    for _ in range(stream.steps_per_epoch):
        next(stream)
    bad = dict(stream.stats().bad)
    stream.close()
    rows = [json.loads(line) for line in quarantine.read_text().splitlines()]
    assert len(rows) == sum(bad.values())  # prefetched ones are not counted
    first = [row for row in rows if row["attempt"] == 0]
    assert sorted((row["shard"], row["sample"]) for row in first) == sorted(
        (f"shard-{n // 25:06d}.tar", n % 25) for n in BAD
    )
    assert set(bad) == {"UndecodableImage", "BadCaption"}
    assert all(f"position {row['position']}" in row["message"] for row in rows)


def test_too_many_substitutes_stop_the_run(tmp_path: Path) -> None:
    view = make(tmp_path / "x", BAD)  # type: ignore[arg-type]
    error = first_error(view, on_bad="substitute", max_bad=0.01)
    assert isinstance(error, TooManyBad)
    assert "max_bad = 0.01 (2.0 samples)" in str(error)
    rubble = make(tmp_path / "y", dict.fromkeys(range(200), ("png", b"x")))
    error = first_error(rubble, on_bad="substitute", max_bad=1.0)
    assert isinstance(error, TooManyBad)
    assert "16 samples in a row" in str(error)


def test_passing_read_errors_are_retried_and_lasting_ones_named(
    shapes_view: View, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipeline.store.files._BACKOFF_SECONDS", 0.0)
    calls = []

    def flaky(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        calls.append(len(buffers[0]))
        if len(calls) in (1, 3):
            raise OSError(5, "Input/output error")
        return os.preadv(fd, [buffers[0][:1000]], offset)  # short reads as well

    reader = ShardReader(shapes_view, preadv=flaky)
    assert reader.read(0, sample=0).key == "00000000"
    assert reader.stats().retries == 2
    assert max(calls[:4]) > 1000

    def broken(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        raise OSError(116, "Stale file handle")

    with pytest.raises(MissingShard, match=r"shapes-000000.tar in .*failed 5 times .Stale"):
        ShardReader(shapes_view, preadv=broken).read(0, sample=0)


def test_open_files_are_limited_and_closed(shapes_view: View) -> None:
    before = len(os.listdir("/proc/self/fd"))
    reader = ShardReader(shapes_view, held=Held(files=2, indexes=2))
    for number in range(80):
        reader.read(number % 8, sample=number % 50)
        assert len(os.listdir("/proc/self/fd")) <= before + 2
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_evil_member_never_enters_a_data_set(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("0001.pyd"))
    with pytest.raises(errors.BadMember, match=r"no sample in 1 tars\n.* suffix .pyd"):
        index_folder(tmp_path)
    assert not (tmp_path / MANIFEST).exists()

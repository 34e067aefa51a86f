"""Preparation is deterministic, can be repeated and survives a kill; other readers understand what it writes."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.decode import decode_image
from data_pipeline.errors import BadMember, BadSplit, DataError, Where, WrongView
from data_pipeline.indexing import index_folder
from data_pipeline.loader import StreamingLoader
from data_pipeline.manifest import open_view, verify
from data_pipeline.prepare import RawMembers, encode_image, write_shards
from data_pipeline.shapes.draw import ShapesSpec, shape_sample
from data_pipeline.shapes.make import make_shapes

SMALL = {"count": 25, "resolution": 16, "seed": 1, "samples_per_shard": 10}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.suffix in (".tar", ".idx")}


def test_a_rerun_is_skipped_and_bytes_are_equal_everywhere(tmp_path: Path) -> None:
    view = make_shapes(tmp_path / "a", **SMALL)  # type: ignore[arg-type]
    first, written = content(tmp_path / "a"), times(tmp_path / "a")
    assert make_shapes(tmp_path / "a", **SMALL).sha256 == view.sha256  # type: ignore[arg-type]
    assert times(tmp_path / "a") == written
    make_shapes(tmp_path / "b", **SMALL)  # type: ignore[arg-type]
    assert content(tmp_path / "b") == first
    assert [shard.n for shard in view.shards] == [10, 10, 5]
    assert verify(tmp_path / "a").view_sha256 == view.sha256


def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_shapes(tmp_path / "whole", **SMALL)  # type: ignore[arg-type]
    wanted = content(tmp_path / "whole")

    def killed(index: int, *, spec: ShapesSpec, seed: int) -> object:
        if index == 17:
            raise KeyboardInterrupt
        return shape_sample(index, spec=spec, seed=seed)

    folder = tmp_path / "killed"
    with monkeypatch.context() as patch:
        patch.setattr("data_pipeline.shapes.make.shape_sample", killed)
        with pytest.raises(KeyboardInterrupt):
            make_shapes(folder, **SMALL)  # type: ignore[arg-type]
    assert "shapes-000000.tar" in content(folder)
    assert "shapes-000001.tar" not in content(folder)
    kept = times(folder)
    # Other ways to die: after the tar but before its index, or with a cut one in place.
    make_shapes(folder, **SMALL)  # type: ignore[arg-type]
    assert content(folder) == wanted
    assert times(folder)["shapes-000000.tar"] == kept["shapes-000000.tar"]
    (folder / "manifest.json").unlink()
    (folder / "shapes-000001.idx").unlink()
    (folder / "shapes-000002.tar").write_bytes(b"half")
    make_shapes(folder, **SMALL)  # type: ignore[arg-type]
    assert content(folder) == wanted


def test_another_data_set_is_never_overwritten(tmp_path: Path) -> None:
    make_shapes(tmp_path, **SMALL)  # type: ignore[arg-type]
    before = content(tmp_path)
    with pytest.raises(WrongView, match="seed: there 1, asked 2"):
        make_shapes(tmp_path, **{**SMALL, "seed": 2})  # type: ignore[arg-type]
    assert content(tmp_path) == before


def test_processes_write_the_same_bytes(tmp_path: Path) -> None:
    make_shapes(tmp_path / "one", **SMALL)  # type: ignore[arg-type]
    make_shapes(tmp_path / "two", workers=2, **SMALL)  # type: ignore[arg-type]
    assert content(tmp_path / "one") == content(tmp_path / "two")


@pytest.mark.parametrize("image_format", ["png", "npy", "jpg"])
def test_webdataset_reads_our_shards_and_pixels_are_the_drawn_ones(tmp_path: Path, image_format: str) -> None:
    webdataset = pytest.importorskip("webdataset")
    make_shapes(tmp_path, image_format=image_format, **SMALL)  # type: ignore[arg-type]
    image = np.empty((16, 16, 3), np.uint8)
    tars = [str(path) for path in sorted(tmp_path.glob("*.tar"))]
    number = -1
    for number, sample in enumerate(webdataset.WebDataset(tars, shardshuffle=False)):
        drawn = shape_sample(number, spec=ShapesSpec(resolution=16), seed=1)
        assert sample["__key__"] == f"{number:08d}"
        assert sample["txt"].decode() == drawn.caption
        assert json.loads(sample["json"]) == {**drawn.metadata, "caption": drawn.caption}
        decode_image(sample[image_format], out=image, where=Where("", ""))
        error = np.abs(image.astype(int) - drawn.image)
        assert error.max() == 0 if image_format != "jpg" else error.mean() < 12
    assert number == 24
    # A foreign pass over our tars finds what we recorded while writing.
    ours = open_view(tmp_path)
    assert index_folder(tmp_path).shards == ours.shards


def test_webdataset_and_we_read_each_others_tars_byte_for_byte(tmp_path: Path) -> None:
    """Tars by webdataset's ShardWriter through our index and loader, and our tars through webdataset."""
    webdataset = pytest.importorskip("webdataset")
    samples = {
        f"{i:08d}": {"png": encode_image(drawn.image, image_format="png"), "txt": drawn.caption.encode()}
        for i in range(24)
        for drawn in [shape_sample(i, spec=ShapesSpec(resolution=16), seed=1)]
    }
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.mkdir()
    with webdataset.ShardWriter(str(theirs / "s-%06d.tar"), maxcount=8, encoder=False, verbose=0) as writer:
        for key, members in samples.items():
            writer.write({"__key__": key, **members})
    write_shards([RawMembers(key=k, members=m) for k, m in samples.items()], ours, samples_per_shard=8)

    tars = [str(path) for path in sorted(ours.glob("*.tar"))]
    read = {s["__key__"]: {n: s[n] for n in ("png", "txt")} for s in webdataset.WebDataset(tars, shardshuffle=False)}
    assert read == samples

    streams = [StreamingLoader(view, global_batch=8, resolution=16) for view in (index_folder(theirs), open_view(ours))]
    for _ in range(3):
        foreign, own = (next(stream) for stream in streams)
        assert foreign.keys == own.keys
        assert foreign.captions == own.captions == tuple(samples[key]["txt"].decode() for key in own.keys)
        assert foreign.images is not None
        assert np.array_equal(foreign.images, own.images)
    for stream in streams:
        stream.close()


def test_refusals(tmp_path: Path) -> None:
    good = {"txt": b"x"}
    with pytest.raises(BadSplit, match="0 samples"):
        write_shards([], tmp_path / "a")
    for key, members in (("a.b", good), ("../a", good), ("a", {"pyd": b""}), ("k" * 300, good)):
        with pytest.raises(BadMember):
            write_shards([RawMembers(key=key, members=members)], tmp_path / "b")
    with pytest.raises(BadMember, match=r"side by side|twice"):
        write_shards([RawMembers(key="a", members=good)] * 2, tmp_path / "c")
    with pytest.raises(DataError, match="image_format = 'gif'"):
        make_shapes(tmp_path / "d", image_format="gif", **SMALL)  # type: ignore[arg-type]
    assert not list(tmp_path.glob("*/*.tar*"))


def test_the_room_stands_alone() -> None:
    """No torch, no trainer; image libraries come with the first image."""
    code = (
        "import sys, data_pipeline.loader, data_pipeline.prepare, data_pipeline.shapes.grader\n"
        "bad = {'torch', 'ecdit_train', 'launch', 'cv2', 'PIL', 'simplejpeg', 'webdataset'} & set(sys.modules)\n"
        "sys.exit(', '.join(bad) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

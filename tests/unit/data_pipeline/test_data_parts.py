"""A data set made, indexed and verified by several processes is the one that a single process makes."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.errors import CorruptShard, DataError, MissingShard
from data_pipeline.indexing import index_tars
from data_pipeline.manifest import MANIFEST, open_view, read_manifest, verify
from data_pipeline.parts import Part
from data_pipeline.shapes.make import make_shapes

SMALL = {"count": 45, "resolution": 16, "seed": 1, "samples_per_shard": 10}


def part(number: int, of: int = 2) -> Part:
    return Part(number=number, of=of)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_parts_make_the_same_bytes(tmp_path, order):
    """Whoever is last writes the manifest; before that the folder is no data set."""
    make_shapes(tmp_path / "whole", **SMALL)
    first, last = order
    assert make_shapes(tmp_path / "parts", part=part(first), **SMALL) is None
    with pytest.raises(MissingShard):
        read_manifest(tmp_path / "parts")
    made = make_shapes(tmp_path / "parts", part=part(last), **SMALL)
    assert made.num_samples == 45
    assert content(tmp_path / "parts") == content(tmp_path / "whole")
    assert make_shapes(tmp_path / "parts", part=part(first), **SMALL).sha256 == made.sha256, "a rerun changes nothing"


def test_a_part_of_other_parameters_does_not_count(tmp_path):
    assert make_shapes(tmp_path, part=part(1), **SMALL) is None
    assert make_shapes(tmp_path, part=part(2), **SMALL | {"seed": 2}) is None
    assert make_shapes(tmp_path, part=part(2), **SMALL).num_samples == 45


def test_more_parts_than_shards(tmp_path):
    for number in range(2, 8):
        assert make_shapes(tmp_path, part=part(number, 7), **SMALL) is None
    assert make_shapes(tmp_path, part=part(1, 7), **SMALL).num_samples == 45


def test_parts_index_plain_tars(tmp_path):
    make_shapes(tmp_path, **SMALL)
    known = read_manifest(tmp_path).shards
    for path in tmp_path.iterdir():
        if path.suffix != ".tar":
            path.unlink()
    assert index_tars(tmp_path, part=part(2)) is None
    assert sorted(path.name for path in tmp_path.glob("*.idx")) == ["shapes-000001.idx", "shapes-000003.idx"]
    assert not (tmp_path / MANIFEST).exists()
    assert index_tars(tmp_path, part=part(1)).view.shards == known
    assert open_view(tmp_path).num_samples == 45


def test_a_part_verifies_its_shards(tmp_path):
    make_shapes(tmp_path, **SMALL)
    tar = tmp_path / "shapes-000001.tar"
    data = bytearray(tar.read_bytes())
    data[600] ^= 1
    tar.write_bytes(data)
    assert verify(tmp_path, part=part(1)).samples == 25
    with pytest.raises(CorruptShard, match="shapes-000001"):
        verify(tmp_path, part=part(2))
    with pytest.raises(DataError, match="shapes-000001"):
        verify(tmp_path)


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "1/0", "a/b", "-1/2"])
def test_what_is_no_part(text):
    with pytest.raises(ValueError, match="must be I/N"):
        Part.parse(text)
    assert str(Part.parse("2/4")) == "2/4"

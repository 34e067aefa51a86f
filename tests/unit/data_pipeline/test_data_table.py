"""The rows of a large manifest lie in a table: the same rows, read where they are asked for, and no damage goes unseen."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.data_setup import measure, write_set
from data_pipeline import manifest
from data_pipeline.errors import CorruptShard, DataError, MissingShard, TruncatedShard
from data_pipeline.loader import StreamingLoader
from data_pipeline.manifest import HISTORY, MANIFEST, View, open_view, read_manifest, verify, write_manifest
from data_pipeline.table import Columns, Rows, Shard


@pytest.fixture
def as_table(copied_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The set with its rows in a table."""
    shards = list(read_manifest(copied_folder).shards)
    monkeypatch.setattr(manifest, "READABLE", 0)
    write_manifest(copied_folder, shards=shards)
    return copied_folder


def table_of(folder: Path) -> Path:
    return next((folder / HISTORY).glob("*.table"))


def test_a_table_holds_the_rows_of_the_readable_form(shapes_view: View, as_table: Path) -> None:
    view = open_view(as_table)
    assert json.loads((as_table / MANIFEST).read_text())["version"] == 2
    assert (as_table / MANIFEST).stat().st_size < 1000
    assert list(view.shards) == list(shapes_view.shards)
    assert view.shards == shapes_view.shards
    assert view.shards[-1] == shapes_view.shards[7]
    assert view.shards[2:4] == shapes_view.shards[2:4]
    assert view.shards != shapes_view.shards[:7]
    assert (view.num_samples, view.num_bytes, view.fields) == (400, shapes_view.num_bytes, shapes_view.fields)
    assert view.shard_sizes.tolist() == shapes_view.shard_sizes.tolist()
    verify(as_table)
    mine, theirs = (StreamingLoader(v, global_batch=40, resolution=16, seed=1) for v in (view, shapes_view))
    assert next(mine).keys == next(theirs).keys
    with pytest.raises(IndexError):
        view.shards[8]


def test_fields_and_sizes_of_any_mixture_of_rows_survive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "READABLE", 0)
    rng = np.random.default_rng(0)
    sets = [("jpg",), ("png", "txt"), (), ("jpg", "json", "latent.npy")]
    rows = [
        Shard(
            name=f"{'ü' * int(rng.integers(1, 5))}/{i}.tar", n=int(rng.integers(0, 2**32)), bytes=int(rng.integers(0, 2**41)),
            sha256=rng.bytes(32).hex(), fields=sets[int(rng.integers(0, 4))],
        )
        for i in range(257)
    ]  # fmt: skip
    view = write_manifest(tmp_path, shards=rows)
    assert list(view.shards) == rows
    assert view.fields == tuple(dict.fromkeys(name for row in rows for name in row.fields))
    with pytest.raises(ValueError, match="do not fit"):
        Columns.of([Shard(name="a", n=2**32, bytes=0, sha256="0" * 64, fields=())])


@pytest.mark.parametrize("seed", range(40))
def test_every_changed_byte_of_a_table_is_found(as_table: Path, seed: int) -> None:
    """By the rank that checks; what every rank needs, by every rank."""
    path, rng = table_of(as_table), np.random.default_rng(seed)
    raw, names_bytes = bytearray(path.read_bytes()), sum(len(row.name) for row in read_manifest(as_table).shards)
    at = int(rng.integers(0, len(raw)))
    raw[at] ^= 1 << int(rng.integers(0, 8))
    path.write_bytes(raw)
    with pytest.raises((CorruptShard, TruncatedShard), match=r"table|changed|version"):
        read_manifest(as_table)
    shards = 8
    rest_at = len(raw) - 48 * shards - names_bytes
    if at < rest_at:
        with pytest.raises(DataError):
            read_manifest(as_table, whole=False)


def test_a_table_that_is_cut_longer_missing_or_of_another_set_is_refused(as_table: Path, tmp_path: Path) -> None:
    path = table_of(as_table)
    raw = path.read_bytes()
    for cut in (0, 30, 47, 48, len(raw) // 2, len(raw) - 1):
        path.write_bytes(raw[:cut])
        with pytest.raises(TruncatedShard, match=path.name):
            read_manifest(as_table, whole=False)
    path.write_bytes(raw + b"x")
    with pytest.raises(CorruptShard, match=path.name):
        read_manifest(as_table, whole=False)
    path.unlink()
    with pytest.raises(MissingShard, match=path.name):
        read_manifest(as_table, whole=False)
    other = tmp_path / "other"
    other.mkdir()
    write_manifest(other, shards=list(open_view_rows(raw, tmp_path))[:3])
    shutil.copy(table_of(other), path)
    with pytest.raises(CorruptShard, match="another manifest"):
        read_manifest(as_table, whole=False)


def open_view_rows(raw: bytes, tmp_path: Path) -> Rows:
    from data_pipeline.table import open_table

    (tmp_path / "copy.table").write_bytes(raw)
    return Rows(open_table(tmp_path / "copy.table", whole=True))


def test_verify_holds_the_table_against_the_sum_that_the_manifest_names(as_table: Path) -> None:
    content = json.loads((as_table / MANIFEST).read_text())
    content["table"]["sha256"] = "0" * 64
    (as_table / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(CorruptShard, match="sha256 differs"):
        verify(as_table)


def test_names_may_not_lead_outside(as_table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = Shard(name="../x.tar", n=1, bytes=512, sha256="0" * 64, fields=("txt",))
    view = write_manifest(as_table, shards=[row])
    with pytest.raises(CorruptShard, match="leads outside"):
        view.tar(0)
    content = json.loads((as_table / MANIFEST).read_text())
    content["table"]["name"] = "../other.table"
    (as_table / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(CorruptShard, match="leads outside"):
        read_manifest(as_table)


def test_files_are_looked_at_by_whoever_is_asked_to(as_table: Path) -> None:
    names = [row.name for row in read_manifest(as_table).shards]
    (as_table / names[3]).unlink()
    (as_table / names[5]).with_suffix(".idx").write_bytes(b"")
    with pytest.raises(MissingShard, match=rf"{names[3]} is missing.*\n.*{names[5][:-4]}.idx"):
        open_view(as_table)
    assert open_view(as_table, check_files=False).num_samples == 400


def test_the_start_on_a_large_set_makes_no_object_of_a_shard(tmp_path: Path) -> None:
    """100,000 shards here: `python -m benchmarks.data_setup` measures 1.2 million against target E8."""
    write_set(tmp_path, shards=100_000, samples=1000)
    cost = measure(tmp_path)
    assert cost["samples"] == 100_000_000
    assert cost["cpu_seconds"] < 0.5
    assert cost["added_peak_mb"] < 25  # as Python objects they are 80
    assert cost["state_bytes"] < 1024
    made = "import gc,sys; from data_pipeline.manifest import open_view; from data_pipeline.table import Shard\n" \
        "view = open_view(sys.argv[1], check_files=False); view.num_samples; view.fields; view.shards[7]\n" \
        "print(sum(isinstance(o, (Shard, str)) and 'shard-' in repr(o) for o in gc.get_objects()))"  # fmt: skip
    run = subprocess.run([sys.executable, "-c", made, tmp_path], check=True, capture_output=True, text=True)
    assert int(run.stdout) == 0

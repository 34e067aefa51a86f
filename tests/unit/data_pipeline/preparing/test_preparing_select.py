"""Filters by SQL and duplicates, held against answers computed in plain Python."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from preparing_forms import content, picture

from data_pipeline.errors import DataError
from data_pipeline.prepare import RawMembers, encode_image, write_shards
from data_pipeline.preparing.dedup import find_duplicates, make_prints
from data_pipeline.preparing.fingerprints import fingerprint
from data_pipeline.preparing.local import Local
from data_pipeline.preparing.select import BadFilterError, check_grammar, make_facts, select


@pytest.fixture(scope="module")
def filtered(tmp_path_factory) -> Path:
    """30 samples in shards of 7; `similarity` of the first shard only, and hostile keys."""
    folder, made = tmp_path_factory.mktemp("filtered") / "set", []
    for number in range(30):
        about = {"shard": "ours wins", "WIDTH": "ours wins", "nested": {"deep": number}, 'a "quoted" key': number}
        if number < 7:
            about["similarity"] = number / 10
        pixels = picture(number, height=20 + number, width=30)
        members = {"jpg": encode_image(pixels, image_format="jpg"), "json": json.dumps(about).encode()}
        if number % 3:
            members["txt"] = b"x" * number
        made.append(RawMembers(key=f"{number:03d}", members=members))
    write_shards(made, folder, samples_per_shard=7)
    return folder


CONDITIONS = {
    "height >= 40": lambda n: n >= 20,
    "width = 30 and aspect < 1.2": lambda n: max(20 + n, 30) / min(20 + n, 30) < 1.2,
    "similarity > 0.25": lambda n: 3 <= n < 7,
    "similarity is null": lambda n: n >= 7,
    "caption is null or caption_length between 4 and 9": lambda n: n % 3 == 0 or 4 <= n <= 9,
    "nested.deep % 2 = 0": lambda n: n % 2 == 0,
    '"a ""quoted"" key" < 5 -- a remark': lambda n: n < 5,
    "regexp_matches(key, '1$')": lambda n: n % 10 == 1,
    "problem is null": lambda n: True,
}


@pytest.mark.parametrize("where", CONDITIONS)
def test_conditions(filtered, tmp_path, where):
    work, done = make_facts(filtered, tables=tmp_path)
    assert done.kept == 30
    got = select(work, where=where)
    assert np.flatnonzero(got.mask).tolist() == [n for n in range(30) if CONDITIONS[where](n)]


def test_what_cannot_be_told_is_not_kept_and_counted(filtered, tmp_path):
    got = select(make_facts(filtered, tables=tmp_path)[0], where="similarity > 0.25")
    assert (int(got.mask.sum()), got.unknown) == (4, 23)
    assert any("23 samples: it cannot be told" in line for line in got.lines())


@pytest.mark.parametrize(
    ("where", "why"),
    [
        ("similarty > 0.3", "similarty"),
        ("width >", "syntax error"),
        ("1) or (1", ""),
        ("count(*) > 1", "aggregate"),
        ("row_number() over () > 1", "window"),
        ("width; drop table x", "syntax"),
        ("nested.deeper > 1", "deeper"),
        ("caption > 3", "convert|compare|Cannot"),
    ],
)
def test_a_condition_that_is_wrong_is_one_error_with_the_columns(filtered, tmp_path, where, why):
    work, _ = make_facts(filtered, tables=tmp_path)
    if where == "1) or (1":
        assert select(work, where=where).mask.all()  # parentheses of one's own harm nobody
        return
    with pytest.raises(BadFilterError, match=f"(?is)where = .*{why}.*there are columns .*caption_length"):
        select(work, where=where)


@pytest.mark.parametrize("where", ["width >", "width; drop table x", "width > 3); select (1"])
def test_what_is_no_condition_is_refused_before_any_work(where):
    with pytest.raises(BadFilterError, match="where = "):
        check_grammar(where)
    check_grammar("no_such_column > 3 -- known later")


def test_side_files_of_img2dataset(filtered, tmp_path):
    import shutil

    import duckdb

    folder = Path(shutil.copytree(filtered, tmp_path / "set [1]"))  # DuckDB would read a pattern
    for shard in (0, 2):
        rows = ", ".join(f"('{n:03d}', {n / 30}, 'shadowed')" for n in range(7 * shard, 7 * shard + 7))
        table = duckdb.connect()
        table.execute(f"CREATE TABLE t AS SELECT * FROM (VALUES {rows}) AS v(key, aesthetic, caption)")
        table.execute(f"COPY t TO '{tmp_path / 'side.parquet'}' (FORMAT parquet)")
        (tmp_path / "side.parquet").rename(folder / f"shard-{shard:06d}.parquet")
    got = select(
        make_facts(folder)[0], where="aesthetic > 0.1 and caption_length > 0 and (caption is null or caption[1] = 'x')"
    )
    assert np.flatnonzero(got.mask).tolist() == [n for n in (*range(7), *range(14, 21)) if n / 30 > 0.1 and n % 3]
    assert got.unknown == 11  # of the others, those with a caption


def variants(number: int) -> list[np.ndarray]:
    """A picture, the same resized, compressed badly, brighter."""
    import cv2

    original = picture(number, height=64, width=96)
    noise = np.random.default_rng(number).integers(-3, 4, original.shape)
    return [
        original,
        cv2.resize(original, (48, 32), interpolation=cv2.INTER_AREA),
        np.clip(original + noise, 0, 255).astype(np.uint8),
        np.clip(original.astype(int) + 12, 0, 255).astype(np.uint8),
    ]


def png_set(pictures: list[np.ndarray], folder: Path, *, per_shard: int = 5) -> Path:
    made = [
        RawMembers(key=f"{n:04d}", members={"png": encode_image(one, image_format="png"), "txt": b"x"})
        for n, one in enumerate(pictures)
    ]
    write_shards(made, folder, samples_per_shard=per_shard)
    return folder


def test_exact_and_near_duplicates(tmp_path):
    pictures, wanted = [], []
    for number in range(8):
        pictures += variants(number)
        wanted += [4 * number] * 4
    flat = [np.full((20, 20, 3), value, np.uint8) for value in (7, 200, 7)]
    pictures += [pictures[9], *flat]
    wanted += [8, 33, 34, 33]
    folder = png_set(pictures, tmp_path / "set")
    work, done = make_prints(folder)
    assert done.kept == 36
    found = find_duplicates(work, distance=8)
    assert found.first.tolist() == wanted
    assert (found.exact, found.near) == (2, 24)
    assert [c.tolist() for c in found.clusters()][-1] == [33, 35], "flat pictures are compared by their pixels only"
    exact = find_duplicates(work, distance=-1)
    assert (exact.exact, exact.near, int(exact.mask.sum())) == (2, 0, 34)
    with pytest.raises(DataError, match="distance = 16"):
        find_duplicates(work, distance=16)


@pytest.mark.parametrize("distance", [0, 1, 3, 6])
def test_the_banded_search_finds_what_comparing_all_pairs_finds(distance):
    from data_pipeline.preparing.dedup import _first_of_near

    draw = np.random.default_rng(distance)
    seeds = draw.integers(0, 1 << 63, 40, dtype=np.uint64)
    bits = seeds[draw.integers(0, 40, 400)]
    for _ in range(5):
        bits = bits ^ np.where(
            draw.random(400) < 0.5, np.uint64(1) << draw.integers(0, 64, 400, dtype=np.uint64), np.uint64(0)
        )
    close = np.bitwise_count(bits[:, None] ^ bits[None, :]) <= distance
    first = np.arange(400)
    while True:
        lower = np.array([first[row].min() for row in close])
        if (lower == first).all():
            break
        first = lower
    assert _first_of_near(bits, distance=distance).tolist() == first.tolist()


def test_unlike_pictures_are_far_apart():
    prints = np.array([fingerprint(picture(n, height=64, width=64))[1] for n in range(60)], np.uint64)
    apart = np.bitwise_count(prints[:, None] ^ prints[None, :])[~np.eye(60, dtype=bool)]
    assert apart.min() > 8


def test_tables_are_resumed_and_do_not_depend_on_workers(tmp_path):
    folder = png_set([picture(n, height=16, width=16) for n in range(20)], tmp_path / "set")
    for make, kind in ((make_facts, "facts"), (make_prints, "prints")):
        make(folder, tables=tmp_path / "one")
        make(folder, tables=tmp_path / "two", runner=Local(workers=2))
        whole = content(tmp_path / "one" / kind)
        assert content(tmp_path / "two" / kind) == whole
        assert len(whole) == 9
        times = {path: path.stat().st_mtime_ns for path in (tmp_path / "one" / kind).iterdir()}
        next(iter(sorted((tmp_path / "one" / kind).glob("000002*.done.json")))).unlink()
        make(folder, tables=tmp_path / "one")
        assert content(tmp_path / "one" / kind) == whole
        again = [path.name for path in times if path.stat().st_mtime_ns != times[path]]
        assert all(name.startswith("000002") for name in again)
        assert again


def test_a_json_that_no_database_reads_costs_no_other_sample(tmp_path):
    deep: object = 1
    for _ in range(500):
        deep = [deep]
    about = [{"a": "\ud800", "\ud801": 1}, {"a": deep}, {"a": "good", "score": 3}]
    pixels = encode_image(picture(1, height=8, width=8), image_format="jpg")
    members = [{"jpg": pixels, "json": json.dumps(one).encode()} for one in about]
    write_shards([RawMembers(key=f"{n}", members=m) for n, m in enumerate(members)], tmp_path / "set")
    work, done = make_facts(tmp_path / "set", tables=tmp_path / "tables")
    assert done.kept == 3
    assert np.flatnonzero(select(work, where="score = 3").mask).tolist() == [2]
    assert np.flatnonzero(select(work, where="height = 8").mask).tolist() == [0, 1, 2]

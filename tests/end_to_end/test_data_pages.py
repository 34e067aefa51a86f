"""The pages about data, typed from top to bottom in an empty folder: no command is left out, and outputs are those that are shown.

What a page supposes to be there is made before (`given_*`); what a command needs that stands in no block of the page, in `BEFORE`.
A line that is written into a `bash` block of one of the pages is run from then on.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from foreign_sets import downloads, named, page_example, picture, plain, tar_file
from page_reader import Reader, commands, files_of, shown, steady, text_of, unrun
from tiny_runs import records

from benchmarks.object_server import ObjectServer
from data_pipeline.keys import keys_by_shard
from data_pipeline.manifest import open_view


def nothing(reader: Reader) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Page:
    """How a page is typed."""

    given: Callable[[Path], None]
    """Fills the working directory with what the page supposes."""
    before: Mapping[str, Callable[[Reader], None]] = field(default_factory=dict)
    """Beginning of a line -> what is done before it."""
    codes: Mapping[str, int] = field(default_factory=dict)
    """Beginning of a line -> its exit code, where that is not 0."""
    says: Mapping[str, str] = field(default_factory=dict)
    """Beginning of a line -> a pattern of its output."""
    fill: Mapping[str, str] = field(default_factory=dict)
    slow: tuple[str, ...] = ()
    """Beginnings of lines that only the slow form types."""


def plain_tars(folder: Path, *, count: int, first: int = 0, per_tar: int = 20) -> None:
    for tar in range(count // per_tar):
        numbers = range(first + per_tar * tar, first + per_tar * (tar + 1))
        tar_file(folder / f"{tar:05d}.tar", named([(f"{n:06d}", plain(n)) for n in numbers]))


def given_tars(folder: Path) -> None:
    page_example(folder / "data" / "images")
    plain_tars(folder / "served" / "images", count=60)


def given_downloads(folder: Path) -> None:
    downloads(folder / "downloads")


SHAPES = [(24, 24)] * 20 + [(40, 64)] * 26 + [(64, 40)] * 6 + [(30, 33)] * 8
"""Of data/photos: 28 squares, 26 wide ones, 6 high ones."""


def given_sets(folder: Path) -> None:
    photos = [
        (f"{n:06d}", {"jpg": picture(n, height=h, width=w), "txt": f"photo {n}".encode()})
        for n, (h, w) in enumerate(SHAPES)
    ]
    order = np.random.default_rng(0).permutation(len(photos))
    for tar in range(3):
        members = named([photos[n] for n in order[20 * tar : 20 * tar + 20]])
        for place in (folder / "data" / "photos", folder / "served" / "photos"):
            tar_file(place / f"{tar:05d}.tar", members)
    plain_tars(folder / "data" / "art", count=40, first=500)
    (folder / "blurred.txt").write_text("000003\n000004\n000050\n")
    (folder / "asked.txt").write_text("\n".join(f"{n:06d}" for n in range(10, 40)) + "\n")


def indexed(reader: Reader) -> None:
    for name in ("photos", "art"):
        reader.must(f"ecdit data index data/{name}")


def no_room_yet(reader: Reader) -> None:
    """The page's set and the one of the commands above have one name."""
    shutil.rmtree(reader.folder / "data" / "latents", ignore_errors=True)


PAGES = {
    "add-your-data": Page(
        given=given_tars,
        says={"ecdit data index s3": "60 samples in 3 shards", "ecdit data index 'https": "60 samples in 3 shards",
              "ecdit data encode": r"kept +60 samples in 3 shards"},
    ),
    "prepare-a-data-set": Page(
        given=given_downloads,
        says={"ecdit data pack": r"kept +50 samples", "ecdit data encode": r"kept +50 samples"},
        before={"ecdit data encode data/images data/latents experiment=ec_dit_xl_8e runner=ray": no_room_yet},
        fill={"workers=8": "workers=2", "workers=64 actors=8": "workers=2 actors=1"},
        slow=("ecdit data encode data/images data/latents experiment=ec_dit_xl_8e runner=ray",),
    ),
    "choose-what-a-run-reads": Page(
        given=given_sets,
        before={"ecdit train experiment=shapes_tiny 'data.sources": indexed},
        codes={"ecdit train experiment=shapes_tiny data.shards=data/photos run=runs/long": 75},
        says={"ecdit data keep": "57 of 60", "ecdit data takedown": "30 of 60",
              "ecdit resume runs/long": "30 samples of 1 lists are taken down",
              "ecdit train experiment=shapes_tiny data.order=streamed": "at least once"},
    ),
}  # fmt: skip


@contextmanager
def web(folder: Path) -> Iterator[dict[str, str]]:
    """`https://host` and the bucket, where the folder `served` is there."""
    (folder / "served").mkdir(exist_ok=True)
    with ObjectServer(folder / "served") as server:
        yield {"https://host": server.url.rstrip("/")}


@pytest.mark.parametrize("name", PAGES)
def test_no_command_of_a_page_stays_unrun(name: str) -> None:
    assert unrun(text_of(name)) == []
    lines = commands(text_of(name))
    page = PAGES[name]
    for beginning in (*page.before, *page.codes, *page.says):
        assert any(line.startswith(beginning) for line in lines), beginning


def of(table: Mapping[str, object], line: str, default: object) -> object:
    return next((value for beginning, value in table.items() if line.startswith(beginning)), default)


@pytest.mark.parametrize(
    ("name", "whole"),
    [
        *((name, False) for name in PAGES),
        *(pytest.param(name, True, marks=pytest.mark.slow) for name, page in PAGES.items() if page.slow),
    ],
)
def test_a_page_is_typed(name: str, whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, text = PAGES[name], text_of(name)
    page.given(tmp_path)
    with web(tmp_path) as served:
        for key, value in (("AWS_ACCESS_KEY_ID", "me"), ("AWS_SECRET_ACCESS_KEY", "s"), ("AWS_REGION", "us-east-1")):
            monkeypatch.setenv(key, value)
        monkeypatch.setenv("AWS_ENDPOINT_URL", served["https://host"])
        reader = Reader(tmp_path, monkeypatch, fill={**page.fill, **served})
        reader.save(files_of(text))
        outputs = shown(text)
        done = set()
        for line in commands(text):
            if line.startswith(page.slow) and page.slow and not whole:
                continue
            before = next((b for beginning, b in page.before.items() if line.startswith(beginning)), nothing)
            if before not in done:
                before(reader)
                done.add(before)
            code, said = reader.types(line)
            assert code == of(page.codes, line, 0), f"{line}\nexit code {code}\n{said}"
            assert re.search(str(of(page.says, line, "")), said), f"{line}\n{said}"
            if line in outputs:
                assert steady(outputs[line]) in steady(said), f"{line}\n{said}"
    check = globals().get(f"check_{name.replace('-', '_')}")
    if check is not None:
        check(tmp_path)


def check_choose_what_a_run_reads(folder: Path) -> None:
    """What the commands were about did happen."""
    runs = folder / "runs"
    assert max(line["data/passed_over"] for line in records(runs / "long")) > 0
    assert records(runs / "long")[-1]["step"] > 4
    keys = [key for names in keys_by_shard(open_view(folder / "data" / "photos")) for key in names]
    assert len(keys) == 60
    assert {path.name for path in (folder / "data" / "sizes").iterdir()} == {"24x24.keep", "20x32.keep"}
    config = (runs / "warm" / "resolved.yaml").read_text()
    assert "warm.Warm" in config
    assert max(line["data/skipped"] for line in records(runs / "warm")) > 0  # captions of fewer than 8 letters
    assert {"mixed", "sharp", "long", "shapes", "large", "far", "streamed", "warm", "dali"} <= set(os.listdir(runs))
    assert json.loads((folder / "data" / "far" / "manifest.json").read_text())["base"] == "s3://bucket/photos"

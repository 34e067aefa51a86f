"""Sets that others wrote, by the commands of docs/how-to/add-your-data.md as they stand there: each works at the first try, and
every sample is accounted for."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from foreign_sets import PACKED, PLAIN, Expected, named, plain, tar_file
from page_reader import Reader, commands, section, text_of
from tiny_runs import records

ADD = text_of("add-your-data")
TARS = section(ADD, "## Plain tars")
INDEX, STATS, VERIFY = commands(TARS.partition("### Tars in a bucket")[0])
(TRAIN,) = commands(section(TARS, "### Train"))
(PACK,) = commands(section(text_of("prepare-a-data-set"), "## Pack"))


def counted(said: str, word: str) -> dict[str, int]:
    """`ignored  20 members: suffix .cls` -> {"suffix .cls": 20}; an example between brackets is left out."""
    found = re.findall(rf"^{word} +([\d,]+) (?:samples|members): (.*?)(?: \(.*\))?$", said, flags=re.MULTILINE)
    return {reason: int(count.replace(",", "")) for count, reason in found}


def check(said: str, expected: Expected) -> None:
    assert re.search(rf"^accepted +{expected.accepted} samples in {expected.shards} shards$", said, re.MULTILINE), said
    assert counted(said, "ignored") == expected.ignored, said
    assert counted(said, "rejected") == expected.rejected, said
    aside = dict(re.findall(r"^set aside +(\S+): (.*)$", said, flags=re.MULTILINE))
    assert aside.keys() == expected.set_aside.keys()
    assert all(part in aside[name] for name, part in expected.set_aside.items())


def check_run(reader: Reader, expected: Expected) -> None:
    said = reader.must(TRAIN, *expected.train)
    lines = records(reader.folder / "runs" / "mine")
    assert lines[-1]["step"] == len(lines) >= 3, said
    for line in lines:
        assert (line["data/substituted"], line["data/skipped"]) == (0, 0)
    for name in expected.metrics:
        assert max(line[name] for line in lines) > 0


def test_the_page_has_these_commands():
    assert [line.split()[1:3] for line in (INDEX, STATS, VERIFY)] == [["data", w] for w in ("index", "stats", "verify")]
    assert TRAIN.startswith("ecdit train ")
    assert PACK.startswith("ecdit data pack downloads data/images ")


@pytest.mark.parametrize("name", PLAIN)
def test_tars_of_others(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make: Callable[[Path], Expected] = PLAIN[name]
    expected = make(tmp_path / "data" / "images")
    before = {path: path.read_bytes() for path in (tmp_path / "data" / "images").rglob("*.tar")}
    reader = Reader(tmp_path, monkeypatch)
    check(reader.must(INDEX), expected)
    assert reader.must(INDEX) == reader.must(INDEX)
    said = reader.must(STATS)
    check(said, expected)
    batch = int(STATS.split()[-1])
    assert f"steps of {batch}; {expected.accepted % batch} samples are left out" in said
    check(reader.must(VERIFY), expected)
    check_run(reader, expected)
    assert {path: path.read_bytes() for path in before} == before


def test_a_tar_in_the_order_of_a_directory_is_mended_as_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain `tar -cf` takes files as the file system lists them."""
    members = named([(f"{n:03d}", plain(n)) for n in range(20)])
    tar = tmp_path / "data" / "images" / "all.tar"
    tar_file(tar, sorted(members, key=lambda member: member[0].partition(".")[::-1]))
    reader = Reader(tmp_path, monkeypatch)
    code, said = reader.types(INDEX)
    assert code == 66
    assert counted(said.replace("ecdit: BadMember: ", ""), "rejected") == {"members apart": 40}
    mend = re.search(r"tar --sort=name -cf NAME\.tar -C FOLDER \.", said)
    assert mend is not None
    (tmp_path / "unpacked").mkdir()
    reader.must(f"tar -xf {tar} -C unpacked")
    reader.must(mend[0].replace("NAME.tar", str(tar)).replace("FOLDER", "unpacked"))
    check(reader.must(INDEX), Expected(accepted=20, shards=1, ignored={"folder": 1}))
    check(reader.must(VERIFY), Expected(accepted=20, shards=1, ignored={"folder": 1}))


def test_whoever_has_too_few_captions_is_told_what_to_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    PLAIN["few_captions"](tmp_path / "data" / "images")
    reader = Reader(tmp_path, monkeypatch)
    reader.must(INDEX)
    code, said = reader.types(TRAIN)
    assert code == 64
    assert "data.no_caption=unconditional or skip" in said
    for word, sums in (("unconditional", (3, 0)), ("skip", (0, 3))):
        epoch = ("train.global_batch=10", "train.microbatch=2", "train.steps=6")  # each of the 60 samples once
        reader.must(TRAIN.replace("runs/mine", f"runs/{word}"), f"data.no_caption={word}", *epoch)
        lines = records(tmp_path / "runs" / word)
        assert tuple(sum(line[f"data/{what}"] for line in lines) for what in ("uncaptioned", "skipped")) == sums


@pytest.mark.parametrize("name", PACKED)
def test_pictures_of_others(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make: Callable[[Path], Expected] = PACKED[name]
    expected = make(tmp_path / "downloads")
    reader = Reader(tmp_path, monkeypatch, fill={"workers=8": "workers=2"})
    said = reader.must(PACK)
    kept = re.search(r"^kept +([\d,]+) samples in (\d+) shards$", said, re.MULTILINE)
    assert kept is not None
    assert (int(kept[1]), int(kept[2])) == (expected.accepted, expected.shards), said
    assert counted(said, "rejected") == expected.rejected
    for line in (VERIFY, STATS):
        check(reader.must(line), replace(expected, rejected={}))  # of what was packed
    check_run(reader, expected)

"""Tars with one thing wrong, hundreds of them: nothing half is delivered, nothing whole is lost without being counted,
and damage is found wherever the format allows it. What it does not allow is named: other bytes inside of a member,
where no sum is stored."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import SAMPLE_ERRORS
from data_pipeline.gather import gather
from data_pipeline.index import scan
from data_pipeline.indexing import index_folder
from data_pipeline.reader import ShardReader
from data_pipeline.tar import BLOCK, Member, survey

Sample = dict[str, bytes]


def make(
    num: int, *, seed: int, kind: str, captions_missing: bool = False, first: int = 0
) -> tuple[bytes, dict[str, Sample]]:
    """A whole tar and what is in it. Pictures are noise that ends like a JPEG; `kind` is a dialect of tar."""
    rng, stream, truth = np.random.default_rng(seed), io.BytesIO(), {}
    dialect = {"ustar": tarfile.USTAR_FORMAT, "pax": tarfile.PAX_FORMAT, "gnu": tarfile.GNU_FORMAT}[kind]
    with tarfile.open(fileobj=stream, mode="w", format=dialect) as tar:
        for number in range(first, first + num):
            key = f"{number:05d}" if kind == "ustar" else f"{'n' * 110}{number:05d}"
            picture = b"\xff\xd8\xff" + rng.bytes(int(rng.integers(100, 5000))) + b"\xff\xd9"
            about = json.dumps({"caption": "c", "sha256": hashlib.sha256(picture).hexdigest()}).encode()
            sample = {"jpg": picture, "json": about, "txt": f"caption {number}".encode()}
            if captions_missing and number % 9 == 4:
                del sample["txt"]
            for field, content in sample.items():
                info = tarfile.TarInfo(f"{key}.{field}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            truth[key] = sample
    return stream.getvalue(), truth


@dataclass(frozen=True)
class Bad:
    """One mutated tar."""

    what: str
    content: bytes
    inside_only: bool = False
    """Whether only the data of members differ, which no tar can tell by itself."""


def members_of(content: bytes) -> list[Member]:
    return [part for part in survey(content) if isinstance(part, Member)]


def mutations(content: bytes, rng: np.random.Generator) -> Iterator[Bad]:
    members = members_of(content)
    last = members[-1].end
    structure = np.ones(len(content), bool)
    for member in members:
        structure[member.data : member.data + member.size] = False

    def changed(what: str, start: int, new: bytes) -> Bad:
        bad = content[:start] + new + content[start + len(new) :]
        where = [n for n in range(start, min(start + len(new), len(content))) if bad[n] != content[n]]
        harmless = all(_is_padding(n, members) for n in where)
        return Bad(what, bad, inside_only=harmless or not structure[where].any())

    for size, step in ((512, 512), (4096, 4096), (4096, 512 * 3)):
        for start in range(0, last - size, step):
            yield changed(f"{size} zeros at {start}", start, bytes(size))
    for _ in range(60):
        start = int(rng.integers(0, last - 4096)) // 512 * 512
        yield changed(f"noise at {start}", start, rng.bytes(4096))
    for _ in range(120):
        at = int(rng.integers(0, last))
        yield changed(f"flip at {at}", at, bytes([content[at] ^ 1 << int(rng.integers(8))]))
    for _ in range(60):
        cut = int(rng.integers(1, last))
        yield Bad(f"cut at {cut}", content[:cut])
    for number in range(len(members)):
        one = members[number]
        yield Bad(f"without {one.name}", content[: one.start] + content[one.end :])
    for _ in range(20):
        junk = rng.bytes(int(rng.integers(1, 3)) * 512)
        yield Bad("junk behind the end", content + junk)


def _is_padding(at: int, members: list[Member]) -> bool:
    return any(member.data + member.size <= at < member.end for member in members)


def delivered(tar: Path) -> tuple[dict[str, Sample], bool]:
    """The samples that an index would name, and whether something was said to be wrong."""
    scanned, content = scan(tar), tar.read_bytes()
    got = {
        sample.key: {field: content[m.data : m.data + m.size] for field, m in sample.fields.items()}
        for sample in scanned.found.samples
    }
    return got, bool(scanned.found.damage or scanned.found.rejected)


@pytest.mark.parametrize(
    ("kind", "captions_missing", "counted"),
    [("ustar", False, False), ("ustar", True, False), ("pax", False, False), ("gnu", True, True)],
)
def test_every_damage_is_found_and_nothing_half_gets_through(
    tmp_path: Path, kind: str, captions_missing: bool, counted: bool
) -> None:
    """`counted`: img2dataset's own number of samples lies beside the tar."""
    content, truth = make(30, seed=3, kind=kind, captions_missing=captions_missing)
    tar, tried, lost = tmp_path / "a.tar", 0, 0
    if counted:
        (tmp_path / "a_stats.json").write_text(json.dumps({"successes": len(truth)}))
    for bad in mutations(content, np.random.default_rng(7)):
        tar.write_bytes(bad.content)
        got, said = delivered(tar)
        tried += 1
        half = [
            key for key, sample in got.items()
            if key in truth and sample != truth[key] and not _may_differ(sample, truth[key], bad=bad, kind=kind)
        ]  # fmt: skip
        assert not half, (bad.what, half)
        assert set(got) <= set(truth), bad.what
        whole = set(_whole(truth, bad.content))
        lost += len(whole - set(got))
        assert len(whole - set(got)) <= 2, (bad.what, sorted(whole - set(got)))
        if set(got) != set(truth) and not _is_missing_field(bad):
            assert said, bad.what
    assert tried > 300
    assert lost < 0.5 * tried  # beside damage, a whole sample cannot always be told from a half one


def _may_differ(sample: Sample, true: Sample, *, bad: Bad, kind: str) -> bool:
    """What cannot be known: captions and json of other bytes (no sum is stored of them); a member that its writer left out; and a
    long name that ends in something else, which no checksum of the header covers (it is counted as ignored)."""
    if set(sample) < set(true) and (
        bad.what.startswith("without") or (bad.what.startswith("flip") and kind != "ustar")
    ):
        return all(sample[field] == true[field] for field in sample)
    same_sizes = {f: len(v) for f, v in sample.items()} == {f: len(v) for f, v in true.items()}
    return (same_sizes and sample["jpg"] == true["jpg"]) or (same_sizes and sample["json"] != true["json"])


def _is_missing_field(bad: Bad) -> bool:
    return bad.what.startswith("without")


def _whole(truth: dict[str, Sample], content: bytes) -> Iterator[str]:
    """Samples whose bytes stand in the mutated file, headers and all."""
    for key, sample in truth.items():
        if all(value in content for value in sample.values()):
            yield key


def test_one_flipped_header_costs_one_sample() -> None:
    content, truth = make(12, seed=1, kind="ustar")
    member = members_of(content)[13]
    bad = bytearray(content)
    bad[member.start + 3] ^= 4
    found = gather(bytes(bad))
    assert [part.kind for part in found.damage] == ["header"]
    assert found.rejected == {"damaged": 1}
    assert [sample.key for sample in found.samples] == [key for key in truth if key != "00004"]


def test_what_follows_an_end_marker_is_found() -> None:
    one, truth = make(5, seed=1, kind="ustar")
    found = gather(one + make(5, seed=2, kind="ustar", first=5)[0])
    assert [part.kind for part in found.damage] == ["after_end"]
    assert len(found.samples) == 2 * len(truth)


def test_zeros_that_no_writer_leaves() -> None:
    content, _ = make(5, seed=1, kind="ustar")
    assert not gather(content).damage
    assert not gather(content + bytes(-len(content) % (1 << 16))).damage  # a tape's record
    assert [part.kind for part in gather(content + bytes(5 * 10240)).damage] == ["zero_tail"]
    end = members_of(content)[-1].end
    assert not gather(content[:end] + bytes(2 * BLOCK)).damage


@pytest.mark.parametrize("kind", ["ustar", "pax", "gnu"])
def test_damage_after_the_index_was_made_is_found_in_each_sample_and_in_no_other(tmp_path: Path, kind: str) -> None:
    content, truth = make(30, seed=4, kind=kind, captions_missing=False)
    tar = tmp_path / "a.tar"
    tar.write_bytes(content)
    view = index_folder(tmp_path)
    index, tried, found = view.load_index(0), 0, 0
    for bad in mutations(content, np.random.default_rng(8)):
        tar.write_bytes(bad.content)
        reader = ShardReader(view)
        tried += 1
        for sample, key in enumerate(truth):
            start, size = index.span(sample)
            same = bad.content[start : start + size] == content[start : start + size]
            try:
                raw = reader.read(0, sample=sample)
            except SAMPLE_ERRORS:
                assert not same, (bad.what, key)
                found += 1
                continue
            assert same, (bad.what, key)
            assert {name: bytes(value) for name, value in raw.payloads.items()} == truth[key], (bad.what, key)
        reader.close()
    assert tried > 300
    assert found > 300

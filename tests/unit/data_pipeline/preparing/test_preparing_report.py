"""The report: its numbers, and that nothing a caption says becomes part of the page."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

from preparing_forms import REJECTED, picture

from data_pipeline.prepare import RawMembers, encode_image, write_shards
from data_pipeline.preparing.dedup import find_duplicates, made_prints, make_prints
from data_pipeline.preparing.pack import PackRule, pack
from data_pipeline.preparing.progress import watch
from data_pipeline.preparing.report import write_report
from data_pipeline.preparing.select import make_facts
from data_pipeline.preparing.sources import find
from data_pipeline.preparing.work import Count, Record

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "{{ 7 * 7 }}",
    "&lt;b&gt; </figcaption>",
    "\u202e\x07abc",
]


class Page(HTMLParser):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        self.text.append(data)


def packed(forms, tmp_path: Path) -> Path:
    pack(find(forms["tars"]), tmp_path / "set", rule=PackRule(resolution=32))
    return tmp_path / "set"


def test_numbers(forms, tmp_path):
    folder = packed(forms, tmp_path)
    assert made_prints(folder) is None
    page = Page(write_report(make_facts(folder)[0], out=tmp_path / "report.html"))
    assert page.open == []
    words = " ".join(" ".join(page.text).split())
    assert "Nobody has looked for them" in words
    assert "10 samples" in words
    for why, count in REJECTED.items():
        assert re.search(rf"{re.escape(why)} {count} ", words), why
    assert {f"picture {n}" for n in (0, 1, 2, 8, 9, 10, 11, 12, 18, 19)} <= {text.strip() for text in page.text}


def test_it_is_one_file_and_captions_stay_text(tmp_path):
    made = [
        RawMembers(
            key=f"{n:03d}",
            members={
                "jpg": encode_image(picture(n % 4, height=40, width=60), image_format="jpg"),
                "txt": text.encode(),
            },
        )
        for n, text in enumerate(HOSTILE * 2)
    ]
    folder = tmp_path / "set <b>"
    write_shards(made, folder, samples_per_shard=4)
    work, _ = make_prints(folder)
    assert made_prints(folder) is not None
    found = find_duplicates(work, distance=2)
    path = write_report(make_facts(folder)[0], out=tmp_path / "report.html", duplicates=found)
    page = Page(path)
    assert page.open == []
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "object", "b>"}
    assert all("onerror" not in attrs for _, attrs in page.tags)
    from PIL import Image

    images = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    assert len(images) == 10 + 10  # the sheet, and four clusters of all ten
    for source in images:
        assert source.startswith("data:image/jpeg;base64,")
        assert max(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).size) <= 160
    text = "".join(page.text)
    assert all(caption.replace("\x07", "") in text.replace("\x07", "") for caption in HOSTILE)
    assert "6 samples with the pixels of an earlier one" in text
    assert (
        re.search(
            r"src=|href=", re.sub(r'src="data:[^"]*"', "", path.read_text()).replace("&#34;&gt;&lt;img src=x", "")
        )
        is None
    )


def test_a_set_of_latents_has_a_report_too(tmp_path):
    import numpy as np

    from data_pipeline.preparing.pixels import npy_bytes

    made = [
        RawMembers(key=f"{n}", members={"latent.npy": npy_bytes(np.zeros((4, 8, 8), np.float16)), "txt": b"x" * n})
        for n in range(1, 9)
    ]
    write_shards(made, tmp_path / "set", samples_per_shard=4)
    page = Page(write_report(make_facts(tmp_path / "set")[0], out=tmp_path / "report.html"))
    assert "Contact sheet" not in page.text
    assert "Letters of the caption" in page.text


def test_progress_in_lines_and_as_a_bar(monkeypatch):
    record = Record(
        inputs=(),
        params_sha256="",
        code=1,
        taken=10,
        kept=8,
        rejected={"aspect": 2},
        examples={},
        damage=(),
        sha256="",
        bytes=0,
    )
    out = io.StringIO()
    with watch("pack", file=out)(2) as watcher:
        watcher.finished(record, fresh=True)
        watcher.finished(record, fresh=False)
    assert re.fullmatch(r"pack: 2/2 shards, 16 samples, [\d,]+/s, 4 rejected\n", out.getvalue())
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    with watch("pack", file=terminal)(2) as watcher:
        watcher.finished(record, fresh=True)
    assert "1/2 shards, 8 samples" in terminal.getvalue()


def test_counts_add_up():
    count = Count()
    count.keep()
    for number in range(9):
        count.reject("why", words=f"{number}")
    assert (count.taken, count.kept, count.rejected.total()) == (10, 1, 9)
    assert len(count.examples["why"]) == 5

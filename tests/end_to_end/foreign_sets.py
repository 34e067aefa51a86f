"""Data sets as others write them: stock webdataset, img2dataset in its three forms, GNU tar, Python's tarfile.

Each maker fills a folder and says exactly what is to become of it.
"""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import tarfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

Members = Mapping[str, bytes]
"""Suffix -> content, of one sample."""


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What indexing says."""

    accepted: int
    shards: int
    ignored: Mapping[str, int] = field(default_factory=dict)
    """reason -> members"""
    rejected: Mapping[str, int] = field(default_factory=dict)
    """reason -> samples"""
    set_aside: Mapping[str, str] = field(default_factory=dict)
    """tar -> a part of the reason"""
    train: tuple[str, ...] = ()
    """Words that the page tells somebody with such a set to add."""
    metrics: tuple[str, ...] = ()
    """Of the run, above 0 in some step."""


@cache
def picture(number: int, *, kind: str = "JPEG", height: int = 24, width: int = 30) -> bytes:
    """A smooth picture, another for each number."""
    small = np.random.default_rng(number).integers(0, 255, (4, 4, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(stream, kind)
    return stream.getvalue()


def plain(number: int) -> dict[str, bytes]:
    return {"jpg": picture(number), "txt": f"picture {number}".encode()}


def shard_writer(folder: Path, samples: Iterable[Members], *, per_tar: int = 20) -> None:
    """As webdataset's own writer leaves them; some members may be missing."""
    import webdataset as wds

    folder.mkdir(parents=True, exist_ok=True)
    with wds.ShardWriter(str(folder / "%05d.tar"), maxcount=per_tar, encoder=False, verbose=0) as writer:
        for number, members in enumerate(samples):
            writer.write({"__key__": f"{number:06d}", **members})


def tar_file(path: Path, members: Iterable[tuple[str, bytes]], *, form: int = tarfile.USTAR_FORMAT) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), 1_700_000_000.25 if form == tarfile.PAX_FORMAT else 1_700_000_000
            tar.addfile(info, io.BytesIO(content))


def named(samples: Iterable[tuple[str, Members]]) -> list[tuple[str, bytes]]:
    return [(f"{key}.{suffix}", content) for key, members in samples for suffix, content in members.items()]


# --- webdataset --------------------------------------------------------------------------------------------------------


def stock(folder: Path) -> Expected:
    shard_writer(folder, (plain(n) for n in range(60)))
    return Expected(accepted=60, shards=3)


def mixed_suffixes(folder: Path) -> Expected:
    """Three kinds of pictures and two of captions, in one tar; letters of any case."""
    kinds = [("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"), ("JPG", "JPEG"), ("jpeg", "JPEG")]
    samples = []
    for n in range(60):
        suffix, kind = kinds[n % 5]
        caption = {"txt": f"text {n}".encode()} if n % 2 else {"json": json.dumps({"caption": f"json {n}"}).encode()}
        samples.append((f"{n:06d}", {suffix: picture(n, kind=kind), **caption}))
    for first in range(0, 60, 30):
        tar_file(folder / f"mixed-{first:02d}.tar", named(samples[first : first + 30]))
    return Expected(accepted=60, shards=2)


def few_captions(folder: Path) -> Expected:
    """5 % have none."""
    shard_writer(folder, ({k: v for k, v in plain(n).items() if k == "jpg" or n % 20 != 3} for n in range(60)))
    words = ("data.no_caption=unconditional", "train.steps=8")
    return Expected(accepted=60, shards=3, train=words, metrics=("data/uncaptioned",))


def strays(folder: Path) -> Expected:
    """Labels, arrays, pickles, notes and hidden files inside of tars; other files in the folder."""
    samples = ({**plain(n), **({"cls": b"7", "npz": b"PK"} if n % 3 == 0 else {})} for n in range(60))
    shard_writer(folder, samples)
    notes = [("README", b"ours"), ("._000100.jpg", b"\0\5\x16\7"), (".DS_Store", b"Bud1"), ("000100.pyd", b"\x80\4.")]
    tar_file(folder / "notes.tar", [*named([("000100", plain(100))]), *notes, *named([("000101", plain(101))])])
    (folder / "README.md").write_text("# ours\n")
    (folder / "sizes.txt").write_text("20 20 20\n")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "lock").write_text("")
    ignored = {"suffix .cls": 20, "suffix .npz": 20, "suffix .pyd": 1, "no suffix": 1, "hidden file": 2}
    return Expected(accepted=62, shards=4, ignored=ignored)


# --- img2dataset -------------------------------------------------------------------------------------------------------


def img2dataset_json(n: int) -> bytes:
    """As it writes them; its sha256 is that of the download, which was resized afterwards."""
    about = {"url": f"http://x/{n}.jpg", "caption": f"picture {n}", "key": f"{n:09d}", "status": "success",
             "error_message": None, "width": 30, "height": 24, "original_width": 600, "original_height": 480,
             "similarity": n / 100, "exif": "{}", "sha256": f"{n:064x}"}  # fmt: skip
    return json.dumps(about, indent=4).encode()


def img2dataset_side(folder: Path, *, shard: int, numbers: Iterable[int], pictures: bool = False) -> None:
    """`00000_stats.json` and `00000.parquet`; a quarter more was asked for and not to be had."""
    import duckdb

    numbers = list(numbers)
    lost = len(numbers) // 4
    count = {"count": len(numbers) + lost, "successes": len(numbers), "failed_to_download": lost, "failed_to_resize": 0,
             "duration": 1.5, "start_time": 0.0, "end_time": 1.5, "status_dict": {"success": len(numbers)}}  # fmt: skip
    (folder / f"{shard:05d}_stats.json").write_text(json.dumps(count, indent=4))
    table = duckdb.connect()
    table.execute("CREATE TABLE t (key VARCHAR, caption VARCHAR, status VARCHAR, similarity DOUBLE, jpg BLOB)")
    rows = [(f"{n:09d}", f"picture {n}", "success", n / 100, picture(n, height=300, width=400)) for n in numbers]
    rows += [(f"{9000 + n:09d}", "gone", "failed_to_download", None, None) for n in range(lost)]
    table.executemany("INSERT INTO t VALUES (?, ?, ?, ?, ?)", rows)
    columns = "*" if pictures else "key, caption, status, similarity"
    table.execute(f"COPY (SELECT {columns} FROM t) TO '{folder / f'{shard:05d}.parquet'}' (FORMAT parquet)")


def img2dataset_tars(folder: Path) -> Expected:
    shard_writer(folder, ({**plain(n), "json": img2dataset_json(n)} for n in range(60)))
    for shard in range(3):
        img2dataset_side(folder, shard=shard, numbers=range(20 * shard, 20 * shard + 20))
    return Expected(accepted=60, shards=3)


def img2dataset_files(folder: Path) -> Expected:
    """To be packed: at 256 pixels, one shard for a thousand pictures in folders."""
    for n in range(60):
        here = folder / f"{n // 20:05d}"
        here.mkdir(parents=True, exist_ok=True)
        (here / f"{n:09d}.jpg").write_bytes(picture(n, height=300, width=400))
        (here / f"{n:09d}.txt").write_text(f"picture {n}")
        (here / f"{n:09d}.json").write_bytes(img2dataset_json(n))
    for shard in range(3):
        img2dataset_side(folder, shard=shard, numbers=range(20 * shard, 20 * shard + 20))
    return Expected(accepted=60, shards=1)


def img2dataset_parquet(folder: Path) -> Expected:
    """To be packed: a quarter of the rows has no picture."""
    folder.mkdir(parents=True)
    for shard in range(3):
        img2dataset_side(folder, shard=shard, numbers=range(20 * shard, 20 * shard + 20), pictures=True)
    return Expected(accepted=60, shards=3, rejected={"no picture: failed_to_download": 15})


# --- tar ---------------------------------------------------------------------------------------------------------------


def nested(folder: Path) -> Expected:
    """Tars in folders of folders, some with the same name; names with folders in the tars, too."""
    for n, where in enumerate(("a/part-0.tar", "a/part-1.tar", "b/deep er/part-0.tar", "ünï/part-0.tar")):
        samples = [(f"2024/01/{i:03d}", plain(15 * n + i)) for i in range(15)]
        tar_file(folder / where, named(samples))
    return Expected(accepted=60, shards=4)


def pax_names(folder: Path) -> Expected:
    """Python's tarfile by default: long and foreign names and times with fractions in extended headers."""
    for n in range(2):
        samples = [(f"{'long name ' * 14}/ключ-{i:04d}-{'x' * 120}", plain(30 * n + i)) for i in range(30)]
        tar_file(folder / f"pax-{n}.tar", named(samples), form=tarfile.PAX_FORMAT)
    return Expected(accepted=60, shards=2)


def gnu_names(folder: Path) -> Expected:
    for n in range(2):
        samples = [(f"{'long/' * 30}{i:04d}-{'y' * 120}", plain(30 * n + i)) for i in range(30)]
        tar_file(folder / f"gnu-{n}.tar", named(samples), form=tarfile.GNU_FORMAT)
    return Expected(accepted=60, shards=2)


def tar_of_a_folder(folder: Path) -> Expected:
    """`tar -cf x.tar .` in a folder of pictures: `./000.jpg`, and the folders as members."""
    loose = folder.parent / "loose"
    for n in range(40):
        (loose / "in").mkdir(parents=True, exist_ok=True)
        for suffix, content in plain(n).items():
            (loose / "in" / f"{n:03d}.{suffix}").write_bytes(content)
    folder.mkdir(parents=True)
    subprocess.run(["tar", "--sort=name", "-C", str(loose), "-cf", str(folder / "all.tar"), "."], check=True)
    return Expected(accepted=40, shards=1, ignored={"folder": 2})


def one_is_damaged(folder: Path) -> Expected:
    """Of four tars one is cut, one is full of zeros in the middle, one is compressed."""
    shard_writer(folder, (plain(n) for n in range(80)))
    cut, zeroed = folder / "00001.tar", folder / "00002.tar"
    cut.write_bytes(cut.read_bytes()[:9000])
    whole = bytearray(zeroed.read_bytes())
    whole[8192:12288] = bytes(4096)
    zeroed.write_bytes(whole)
    packed = folder / "00003.tar"
    packed.write_bytes(gzip.compress(packed.read_bytes()))
    aside = {"00001.tar": "", "00002.tar": "", "00003.tar": "gzip"}
    return Expected(accepted=20, shards=1, set_aside=aside)


# --- the sets whose outputs the pages show -----------------------------------------------------------------------------


def page_example(folder: Path) -> Expected:
    """Of add-your-data.md: four tars; the second has a label in each sample, the third was appended to, the last one is cut.

    Every picture's file is 2048 bytes long, so that the numbers on the page do not depend on a version of libjpeg.
    """

    def sample(n: int) -> dict[str, bytes]:
        return {"jpg": picture(n).ljust(2048, b"\0"), "txt": f"picture number {n:03d}".encode()}

    for tar in range(4):
        samples = [(f"{n:06d}", sample(n)) for n in range(20 * tar, 20 * tar + 20)]
        if tar == 1:
            samples = [(key, {**members, "cls": b"7"}) for key, members in samples]
        if tar == 2:
            samples.append(("000041", sample(41)))
        tar_file(folder / f"{tar:05d}.tar", named(samples))
    cut = folder / "00003.tar"
    cut.write_bytes(cut.read_bytes()[:20000])
    return Expected(
        accepted=60, shards=3, ignored={"suffix .cls": 20}, rejected={"key comes again": 1}, set_aside={"00003.tar": "ends"}
    )  # fmt: skip


def downloads(folder: Path) -> Expected:
    """Of prepare-a-data-set.md: 60 pictures in folders; four are too small, two too long, one is damaged, three have no caption."""
    for n in range(60):
        here = folder / f"{n // 20:05d}"
        here.mkdir(parents=True, exist_ok=True)
        size = (160, 200) if n % 15 == 4 else (260, 900) if n % 30 == 7 else (300, 400)
        payload = picture(n % 50, height=size[0], width=size[1])  # ten come twice
        (here / f"{n:06d}.jpg").write_bytes(payload[:300] if n == 13 else payload)
        if n % 20 != 18:
            (here / f"{n:06d}.txt").write_text(f"picture number {n % 50}")
        about = {"original_width": 4 * size[1], "similarity": (n % 10) / 10}
        (here / f"{n:06d}.json").write_text(json.dumps(about))
    return Expected(accepted=50, shards=1)


PLAIN: dict[str, Callable[[Path], Expected]] = {
    "stock": stock, "mixed_suffixes": mixed_suffixes, "few_captions": few_captions, "strays": strays,
    "img2dataset_tars": img2dataset_tars, "nested": nested, "pax_names": pax_names, "gnu_names": gnu_names,
    "tar_of_a_folder": tar_of_a_folder, "one_is_damaged": one_is_damaged,
}  # fmt: skip
"""Tars, which need no more than an index."""
PACKED: dict[str, Callable[[Path], Expected]] = {
    "img2dataset_files": img2dataset_files, "img2dataset_parquet": img2dataset_parquet,
}  # fmt: skip
"""Pictures that are packed first."""

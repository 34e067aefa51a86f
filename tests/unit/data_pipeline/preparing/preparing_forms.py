"""Sources of every form, of one list of pictures, so that what becomes of them can be told exactly."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data_pipeline.prepare import encode_image

Sample = dict[str, bytes]
"""Members by suffix, and what img2dataset calls its key under `key`."""


def picture(number: int, *, height: int, width: int) -> np.ndarray:
    """uint8 (H, W, 3): smooth, so that JPEG keeps it, and another for each number."""
    draw = np.random.default_rng(number)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32) / max(height, width)
    waves = [np.sin(6.3 * (a * x + b * y) + c) for a, b, c in draw.uniform(0.3, 3, (3, 3))]
    return np.clip(127 + 100 * np.stack(waves, -1), 0, 255).astype(np.uint8)


def samples(count: int = 20) -> list[Sample]:
    """Most are good. Every tenth: 3 is cut, 4 is small, 5 is long and thin, 6 has no caption, 7 has one that is not UTF-8."""
    made = []
    for number in range(count):
        kind = number % 10
        size = {4: (20, 24), 5: (40, 150)}.get(kind, (48 + number, 64))
        payload = encode_image(picture(number, height=size[0], width=size[1]), image_format="jpg")
        sample = {
            "jpg": payload[: len(payload) // 8] if kind == 3 else payload,
            "txt": b"\xff\xfe" if kind == 7 else f"picture {number}".encode(),
            "json": json.dumps({"url": f"http://x/{number}", "similarity": number / 100}).encode(),
        }
        if kind == 6:
            del sample["txt"]
        made.append(sample)
    return made


REJECTED = {"undecodable": 2, "too small": 2, "aspect": 2, "no caption": 2, "unreadable caption": 2}
"""Of `samples(20)` at 32 pixels."""


def write_tars(folder: Path, *, per_tar: int = 5) -> None:
    from webdataset import ShardWriter

    folder.mkdir(parents=True)
    with ShardWriter(str(folder / "%05d.tar"), maxcount=per_tar, encoder=False, verbose=0) as writer:
        for number, sample in enumerate(samples()):
            writer.write({"__key__": f"{number:09d}", **sample})
    for tar in sorted(folder.glob("*.tar")):
        tar.with_name(f"{tar.stem}_stats.json").write_text(json.dumps({"count": per_tar, "successes": per_tar}))


def write_files(folder: Path, *, per_tar: int = 5) -> None:
    for number, sample in enumerate(samples()):
        here = folder / f"{number // per_tar:05d}"
        here.mkdir(parents=True, exist_ok=True)
        for suffix, content in sample.items():
            (here / f"{number:09d}.{suffix}").write_bytes(content)


def write_parquet(folder: Path, *, per_tar: int = 5) -> None:
    import duckdb

    folder.mkdir(parents=True)
    every = samples()
    for first in range(0, len(every), per_tar):
        table = duckdb.connect()
        table.execute("CREATE TABLE t (key VARCHAR, caption VARCHAR, status VARCHAR, similarity DOUBLE, jpg BLOB)")
        for number in range(first, first + per_tar):
            sample = every[number]
            caption = sample.get("txt", b"").decode("utf-8", "ignore") or None
            row = [f"{number:09d}", caption, "success", number / 100, sample["jpg"]]
            table.execute("INSERT INTO t VALUES (?, ?, ?, ?, ?)", row)
        table.execute("INSERT INTO t VALUES ('lost', 'x', 'failed_to_download', NULL, NULL)")
        table.execute(f"COPY t TO '{folder / f'{first // per_tar:05d}.parquet'}' (FORMAT parquet)")


def write_table(folder: Path) -> None:
    """Pictures in one folder and a captions.csv, which names one that is not there."""
    folder.mkdir(parents=True)
    lines = ["file,caption,similarity"]
    for number, sample in enumerate(samples()):
        (folder / f"{number:03d}.jpg").write_bytes(sample["jpg"])
        lines.append(f"{number:03d}.jpg,{f'picture {number}' if 'txt' in sample else ''},{number / 100}")
    (folder / "captions.csv").write_text("\n".join([*lines, "gone.jpg,nothing,0"]) + "\n")


WRITERS: dict[str, Callable[[Path], None]] = {
    "tars": write_tars, "files": write_files, "parquet": write_parquet, "table": write_table,
}  # fmt: skip


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def kill_once(marker: str) -> None:
    """Die at the first call, in whatever process that is."""
    path = Path(marker)
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


class Deadly:
    """A source that kills the process which reads its third piece, once or for ever."""

    def __init__(self, source, marker: Path, *, always: bool) -> None:
        self._source, self._marker, self._always = source, marker, always
        self.form, self.folder, self.params = source.form, source.folder, source.params

    def pieces(self):
        return self._source.pieces()

    def read(self, piece):
        if piece.name == "000002":
            if self._always:
                os.kill(os.getpid(), signal.SIGKILL)
            kill_once(str(self._marker))
        yield from self._source.read(piece)

"""Two fingerprints of a picture: the sha256 of its pixels, and 64 bits that stay nearly the same when it is resized or compressed.

The 64 bits are the signs of low frequencies: grey, 32 x 32, cosine transform, its 8 x 8 lowest against their median (the first,
the mean brightness, is not counted). Of a picture without structure they would be noise, so it has none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.assemble import IMAGE_SUFFIXES
from data_pipeline.decode import decode_upright
from data_pipeline.errors import DataError, UndecodableImage, Where
from data_pipeline.preparing.facts import table_tasks
from data_pipeline.preparing.pixels import grey
from data_pipeline.preparing.source_tars import SetSource
from data_pipeline.preparing.work import Count, Service, Task

PRINT = np.dtype([("sha", "V16"), ("bits", "<u8"), ("state", "u1")])
"""Of one sample: 16 bytes of the sha256, the 64 bits, and which of them are there."""
NONE, EXACT, BOTH = 0, 1, 2
"""No picture that can be decoded; one without structure; any other."""
FLAT = 2.0
"""Standard deviation of grey (of 255) below which a picture is without structure."""


@dataclass(frozen=True, kw_only=True)
class PrintWork:
    """`work.Work`: `000000.npy`, ... in a folder, by the number of the shard; `PRINT` (n,)."""

    source: SetSource
    folder: Path
    service: None = None

    @property
    def params(self) -> Mapping[str, Any]:
        return {"made_by": "fingerprints", "version": 1, "flat": FLAT, "source": self.source.params}

    def tasks(self) -> list[Task]:
        return table_tasks(self.source, self.folder, suffix=".npy")

    def make(self, task: Task, *, out: Path, service: Service | None) -> Count:
        row = self.source.view.shards[task.number]
        count, made = Count(sums={row.name: row.sha256}), np.zeros(row.n, PRINT)
        for sample, found in enumerate(self.source.every(task.piece)):
            if isinstance(found, DataError):
                count.reject("damaged", words=str(found))
                continue
            name = next((suffix for suffix in IMAGE_SUFFIXES if suffix in found.fields), None)
            where = Where(row.name, found.key)
            if name is None:
                count.reject("no picture", words=str(where))
                continue
            try:
                pixels = decode_upright(found.fields[name], least=None, where=where).pixels
            except UndecodableImage as error:
                count.reject("undecodable", words=str(error))
                continue
            made[sample] = fingerprint(pixels)
            count.keep()
        with out.open("wb") as file:
            np.lib.format.write_array(file, made, allow_pickle=False)
        return count


def fingerprint(pixels: np.ndarray) -> tuple[bytes, int, int]:
    """Of uint8 (H, W, 3), a record of `PRINT`."""
    shape = np.array(pixels.shape, "<u4").tobytes()
    sha = hashlib.sha256(shape + np.ascontiguousarray(pixels).tobytes()).digest()[:16]
    small = grey(pixels, side=32)
    if small.std() < FLAT:
        return sha, 0, EXACT
    from scipy.fft import dctn

    low = dctn(small, norm="ortho")[:8, :8].ravel()
    signs = low > np.median(low[1:])
    signs[0] = False
    return sha, int(np.packbits(signs, bitorder="little").view("<u8")[0]), BOTH

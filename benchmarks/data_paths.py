"""CPU time of a sample from tar to batch, against what the machine must do at least: `python -m benchmarks.data_paths`.

Floors and ours take turns in one process with one thread, everything in the page cache; the smallest of the rounds counts, since
other work on the machine only ever adds. Both use the memory of batches again, as the loader does. Printed as JSON,
microseconds of CPU a sample.

- JPEG 256 x 256: libjpeg-turbo into a batch buffer from bytes in memory. Bar: 1.15 (E1).
- Latent and padded text embedding, 508 KB: a copy from a memory map into batch buffers. Bar: 2.5 (E2).
- Latents, 16 KB, with a caption: bar 12 microseconds (E3).
"""

from __future__ import annotations

import argparse
import io
import json
import mmap
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import simplejpeg

from benchmarks.timing import Bar, report
from data_pipeline.assemble import ArrayShapes, BatchBuffer, Fields, probe_shapes
from data_pipeline.captions import CaptionRule
from data_pipeline.decoders import PlainDecoder
from data_pipeline.filling import Filler
from data_pipeline.manifest import View, open_view
from data_pipeline.memory import Recycled
from data_pipeline.prepare import RawMembers, write_shards
from data_pipeline.reader import ShardReader
from data_pipeline.sources import DataSet
from data_pipeline.straight import Straight

BATCH = 64
Kind = Literal["jpeg", "latent", "latent_text"]
BARS = {"jpeg": ("E1", "ratio", 1.15), "latent_text": ("E2", "ratio", 2.5), "latent": ("E3", "ours_us", 12.0)}


@dataclass(frozen=True)
class Samples:
    """Made when they are written."""

    kind: Kind
    num: int

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int, /) -> RawMembers:
        rng = np.random.default_rng(index)
        members = {"txt": f"a caption of some length, number {index}".encode()}
        if self.kind == "jpeg":
            # Smooth shapes and some grain: about 19 KB, as a photo has.
            coarse = rng.integers(0, 256, (18, 18, 3)).astype(np.float32)
            smooth = coarse.repeat(15, 0).repeat(15, 1)[:256, :256]
            pixels = np.clip(smooth * 0.8 + rng.normal(0, 9, (256, 256, 3)), 0, 255).astype(np.uint8)
            members["jpg"] = simplejpeg.encode_jpeg(pixels, quality=90, colorspace="RGB")
        else:
            members["latent.npy"] = npy(rng.standard_normal((8, 32, 32)).astype(np.float16))
        if self.kind == "latent_text":
            members["text.npy"] = npy(rng.standard_normal((120, 2048)).astype(np.float16))
        return RawMembers(key=f"{index:08d}", members=members)


def npy(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


class Way:
    """One kind of sample: a function each for the floor and for ours, which make a batch of given samples."""

    def __init__(self, kind: Kind, view: View) -> None:
        self.view, self.kind = view, kind
        self.fields = Fields(
            images=("jpg",) if kind == "jpeg" else (), latents=None if kind == "jpeg" else "latent.npy",
            captions=("txt",), text="text.npy" if kind == "latent_text" else None,
            text_len=120 if kind == "latent_text" else 0,
        )  # fmt: skip
        self.reader = ShardReader(view, reuse=True)
        self.shapes: ArrayShapes = probe_shapes(self.reader, view=view, fields=self.fields)
        self.rule = CaptionRule(sources=self.fields.captions)
        self.memory = Recycled()
        straight = Straight(self.reader, fields=self.fields, shapes=self.shapes, captions=self.rule)
        self.filler = Filler(
            view=view, order=DataSet.of(view).stream(seed=0, global_batch=BATCH), reader=self.reader, decoder=PlainDecoder(),
            substitutes=False, straight=straight if Straight.serves(self.reader, fields=self.fields) else None,
        )  # fmt: skip
        self._maps = [mapped(view.tar(number)) for number in range(len(view.shards))]
        self._places = [self._members(n) for n in range(view.num_samples)]

    def ours(self, numbers: np.ndarray) -> None:
        buffer = BatchBuffer(
            numbers, fields=self.fields, shapes=self.shapes, size=(256, 256), captions=self.rule, allocate=self.memory,
        )  # fmt: skip
        size = self.view.shards[0].n
        self.filler.fill(
            buffer, slots=range(len(numbers)), shards=(numbers // size).tolist(), samples=(numbers % size).tolist()
        )
        buffer.batch()

    def floor(self, numbers: np.ndarray) -> None:
        if self.kind == "jpeg":
            images = self.memory((len(numbers), 256, 256, 3), np.dtype(np.uint8))
            for slot, number in enumerate(numbers.tolist()):
                simplejpeg.decode_jpeg(self._places[number][0], colorspace="RGB", buffer=images[slot])
            return
        rows = [self.memory((len(numbers), len(part)), np.dtype(np.uint8)) for part in self._places[0]]
        for slot, number in enumerate(numbers.tolist()):
            for row, part in zip(rows, self._places[number], strict=True):
                row[slot] = part

    def _members(self, number: int) -> list:
        """Where the pixels and arrays of a sample lie in the map."""
        size = self.view.shards[0].n
        raw = ShardReader(self.view).read(number // size, sample=number % size)
        found = []
        start = self.view.load_index(number // size).span(number % size)[0]
        whole = self._maps[number // size]
        for name in ("jpg", "latent.npy", "text.npy"):
            if name in raw.fields:
                at = whole.find(bytes(raw.fields[name][:200]), start)
                part = memoryview(whole)[at : at + len(raw.fields[name])]
                skip = 0 if name == "jpg" else 128
                found.append(bytes(part) if name == "jpg" else np.frombuffer(part[skip:], np.uint8))
        return found


def mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def cpu(work: Callable[[np.ndarray], None], *, numbers: np.ndarray) -> float:
    """Microseconds of this process for one sample."""
    began = time.process_time()
    for first in range(0, len(numbers), BATCH):
        work(numbers[first : first + BATCH])
    return (time.process_time() - began) / len(numbers) * 1e6


def measure(kind: Kind, *, samples: int, rounds: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Samples(kind, samples), folder, samples_per_shard=samples // 4)
        path = Way(kind, open_view(folder))
        rng, ours, floor = np.random.default_rng(0), [], []
        for _ in range(rounds + 1):
            numbers = rng.permutation(samples)
            floor.append(cpu(path.floor, numbers=numbers))
            ours.append(cpu(path.ours, numbers=numbers))
    floor, ours = floor[1:], ours[1:]  # the first round touches every page for the first time
    return {
        "floor_us": round(min(floor), 2), "ours_us": round(min(ours), 2), "ratio": round(min(ours) / min(floor), 3),
        "median_ratio": round(float(np.median(np.array(ours) / np.array(floor))), 3),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args(argv)
    found = {kind: measure(kind, samples=args.samples, rounds=args.rounds) for kind in BARS}  # type: ignore[arg-type]
    print(json.dumps(found, indent=1))
    bars = [
        Bar(name=f"{target}: {kind}, {figure}", value=found[kind][figure], limit=limit, at_least=False)
        for kind, (target, figure, limit) in BARS.items()
    ]
    return report("data_paths", settings=vars(args), ratios=found, bars=bars)


if __name__ == "__main__":
    sys.exit(main())

"""What a sample costs in our loader and in others, over the same tars: a part of `make bench-data`.

Every variant runs in a process of its own, one after the other within a round, and counts the CPU time of its threads and
worker processes over the same number of samples, after a warm-up: batches of 64 JPEGs of 256 x 256 with captions as uint8
arrays. The page cache is warm. The floor decodes the same files from memory into one buffer with libjpeg-turbo. A result is
the median over rounds of t(variant) / t(floor) within the round.

Peers are set up as their documents say, once with the decoder that they bring and once (where that is possible) with
ours, so that order, reading and batches are compared and not decoders. Megatron-Energon is measured where it is
installed, or in another interpreter: `--energon PYTHON`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.timing import Bar, report

BATCH, SIDE, SHARDS, PER_SHARD = 64, 256, 4, 1000
WARM, ROUNDS = 24, 5
"""Batches before the clock starts: more samples than any shuffle buffer holds, which are read faster until it is full; rounds."""


def photo(rng: np.random.Generator) -> np.ndarray:
    """uint8 (256, 256, 3): smooth shapes with grain; about 20 KB as a JPEG of quality 90, as photographs are."""
    x, y = np.meshgrid(np.linspace(0, 1, SIDE), np.linspace(0, 1, SIDE))
    waves = [np.sin(x * a + y * b + c) for a, b, c in rng.uniform(-14, 14, (3, 3))]
    grain = rng.normal(0, 7, (SIDE, SIDE, 1))
    return np.clip(127 + 70 * np.stack(waves, -1) + grain, 0, 255).astype(np.uint8)


def make_tars(folder: Path) -> None:
    """`SHARDS` tars of `PER_SHARD` samples (jpg, txt, json), by webdataset's own writer."""
    import simplejpeg
    import webdataset as wds

    rng = np.random.default_rng(0)
    for shard in range(SHARDS):
        with wds.TarWriter(str(folder / f"{shard:05d}.tar"), mtime=0) as tar:
            for number in range(PER_SHARD):
                tar.write({
                    "__key__": f"{shard:05d}{number:05d}",
                    "jpg": simplejpeg.encode_jpeg(photo(rng), quality=90, colorspace="RGB"),
                    "txt": f"a picture with the number {number}",
                    "json": {"width": SIDE, "height": SIDE},
                })  # fmt: skip


Batches = Iterator[Any]


def floor(folder: Path) -> Batches:
    """Decoding alone, from memory, into one buffer."""
    import simplejpeg

    from data_pipeline.manifest import open_view
    from data_pipeline.reader import ShardReader

    reader, view = ShardReader(open_view(folder)), open_view(folder)
    files = [bytes(reader.read(0, sample=n).fields["jpg"]) for n in range(int(view.shard_sizes[0]))]  # type: ignore[arg-type]
    out = np.empty((BATCH, SIDE, SIDE, 3), np.uint8)
    place = 0
    while True:
        for slot in range(BATCH):
            simplejpeg.decode_jpeg(files[place % len(files)], colorspace="RGB", buffer=out[slot])
            place += 1
        yield out


def ours(folder: Path, *, threads: int = 0, decoder: str = "plain") -> Batches:
    from data_pipeline.dali import DaliDecoder
    from data_pipeline.loader import StreamingLoader
    from data_pipeline.manifest import open_view

    how = DaliDecoder() if decoder == "dali" else None
    yield from StreamingLoader(
        open_view(folder), global_batch=BATCH, resolution=SIDE, threads=threads, on_bad="substitute", decoder=how
    )


def webdataset(folder: Path, *, decoder: str) -> Batches:
    import webdataset as wds

    def decode(sample: dict[str, Any]) -> tuple[np.ndarray, str]:
        import simplejpeg

        return simplejpeg.decode_jpeg(sample["jpg"], colorspace="RGB"), sample["txt"].decode()

    set_ = wds.WebDataset(tars(folder), shardshuffle=False).repeat().shuffle(1000)
    if decoder == "own":
        yield from set_.decode("rgb8").to_tuple("jpg", "txt").batched(BATCH)
    else:
        yield from set_.map(decode).batched(BATCH)


def torchdata(folder: Path, *, workers: int = 0) -> Batches:
    """A map-style set over our index, as anybody would write it, in torchdata's StatefulDataLoader."""
    import simplejpeg
    from torch.utils.data import Dataset, RandomSampler
    from torchdata.stateful_dataloader import StatefulDataLoader

    from data_pipeline.manifest import open_view
    from data_pipeline.reader import ShardReader

    class Samples(Dataset[Any]):
        def __init__(self) -> None:
            self.view = open_view(folder)
            self.reader = ShardReader(self.view)

        def __len__(self) -> int:
            return self.view.num_samples

        def __getitem__(self, number: int) -> tuple[np.ndarray, str]:
            raw = self.reader.read(number // PER_SHARD, sample=number % PER_SHARD)
            return simplejpeg.decode_jpeg(raw.fields["jpg"], colorspace="RGB"), str(raw.fields["txt"], "utf-8")  # type: ignore[arg-type]

    def collate(samples: list[tuple[np.ndarray, str]]) -> tuple[np.ndarray, list[str]]:
        return np.stack([image for image, _ in samples]), [text for _, text in samples]

    samples = Samples()
    # One epoch for ever: workers are started once, as in an epoch of real length.
    yield from StatefulDataLoader(
        samples,
        batch_size=BATCH,
        sampler=RandomSampler(samples, replacement=False, num_samples=10**7),
        num_workers=workers,
        collate_fn=collate,
    )


def dali(folder: Path) -> Batches:
    """DALI's own reader of WebDataset tars and its decoder."""
    import nvidia.dali as dali
    from nvidia.dali.plugin.base_iterator import LastBatchPolicy  # noqa: F401 - says early that DALI is whole

    fn: Any = dali.fn
    types: Any = dali.types

    def read() -> Any:
        jpg, txt = fn.readers.webdataset(
            paths=tars(folder),
            ext=["jpg", "txt"],
            random_shuffle=True,
            initial_fill=1000,
            missing_component_behavior="error",
        )
        return fn.decoders.image(jpg, device="cpu", output_type=types.RGB), txt

    define: Any = dali.pipeline_def
    pipe = define(read, batch_size=BATCH, num_threads=1, device_id=None, seed=1)()
    pipe.build()
    while True:
        images, texts = pipe.run()
        yield images.as_array(), [bytes(texts.at(n)).decode() for n in range(BATCH)]


def energon(folder: Path) -> Batches:
    """A prepared copy, its savable loader and its `rgb8` decoder."""
    from megatron.energon import (
        DefaultTaskEncoder,
        SampleDecoder,
        WorkerConfig,
        get_savable_loader,
        get_train_dataset,
    )

    class Pixels(DefaultTaskEncoder):
        decoder = SampleDecoder(image_decode="rgb8")  # its default makes floats

        def batch(self, samples: list[Any]) -> Any:
            made = super().batch(samples)
            made.image = np.stack(made.image)
            return made

    set_ = get_train_dataset(
        str(folder / "energon"), batch_size=BATCH, shuffle_buffer_size=1000, max_samples_per_sequence=100,
        task_encoder=Pixels(),
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
    )  # fmt: skip
    yield from get_savable_loader(set_)


def tars(folder: Path) -> list[str]:
    return [str(folder / f"{shard:05d}.tar") for shard in range(SHARDS)]


VARIANTS: dict[str, Callable[[Path], Batches]] = {
    "floor": floor,
    "ours": ours,
    "ours, 2 threads": lambda folder: ours(folder, threads=2),
    "ours, DALI decodes": lambda folder: ours(folder, decoder="dali"),
    "webdataset, our decoder": lambda folder: webdataset(folder, decoder="simplejpeg"),
    "webdataset, rgb8": lambda folder: webdataset(folder, decoder="own"),
    "torchdata over our index, our decoder": torchdata,
    "torchdata, 2 workers": lambda folder: torchdata(folder, workers=2),
    "DALI's reader and decoder": dali,
    "Energon, rgb8": energon,
}


def measure(name: str, folder: Path, *, batches: int) -> dict[str, float]:
    """CPU microseconds a sample, of this process and its children, and the largest memory in MB."""
    stream = VARIANTS[name](folder)
    for number, batch in enumerate(islice(stream, WARM)):
        if number == 0:
            check(name, batch)
    before = _cpu()
    for _ in islice(stream, batches):
        pass
    seconds = _cpu() - before
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1024
    return {"us": 1e6 * seconds / (batches * BATCH), "peak_mb": peak}


def check(name: str, batch: Any) -> None:
    """All variants make the same: pixels of a whole batch as bytes. Raises RuntimeError."""
    if isinstance(batch, tuple | list):
        batch = batch[0]
    pixels = next((getattr(batch, one) for one in ("images", "image") if hasattr(batch, one)), batch)
    found = tuple(np.shape(pixels)), str(getattr(pixels, "dtype", type(pixels))).removeprefix("torch.")
    if found != ((BATCH, SIDE, SIDE, 3), "uint8"):
        raise RuntimeError(f"{name} makes {found[1]} {found[0]}: this is not the same work")


def _cpu() -> float:
    """Of this process and of its children, ended ones included, in seconds."""
    import psutil

    mine = psutil.Process()
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = time.process_time() + ended.ru_utime + ended.ru_stime
    for child in mine.children(recursive=True):
        times = child.cpu_times()
        total += times.user + times.system
    return total


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--energon", metavar="PYTHON", default=sys.executable)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--child", choices=tuple(VARIANTS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    if args.child is not None:
        print(json.dumps(measure(args.child, args.folder, batches=args.batches)))
        return 0
    from data_pipeline.indexing import index_folder

    folder = Path(tempfile.mkdtemp(prefix="ecdit-bench-data-"))
    try:
        make_tars(folder)
        index_folder(folder)
        names = [name for name in VARIANTS if name != "Energon, rgb8" or _prepare_energon(args.energon, folder)]
        found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for number in range(args.rounds):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                found[name].append(_child(name, folder, args))
    finally:
        shutil.rmtree(folder)
    floors = [one["us"] for one in found["floor"]]
    ratios = {
        name: median(one["us"] / base for one, base in zip(runs, floors, strict=True)) for name, runs in found.items()
    }
    print(f"{'':<40}{'CPU us a sample':>16}{'/ floor':>9}{'peak MB':>9}")
    for name, runs in found.items():
        print(
            f"{name:<40}{median(r['us'] for r in runs):>16.0f}{ratios[name]:>9.2f}{max(r['peak_mb'] for r in runs):>9.0f}"
        )
    mine = ratios["ours"]
    bars = [
        Bar(name="E1: ours / decoding alone", value=mine, limit=1.15, at_least=False),
        Bar(name="DALI's reader / ours", value=ratios["DALI's reader and decoder"] / mine, limit=1.25, at_least=True),
        Bar(
            name="webdataset with our decoder / ours",
            value=ratios["webdataset, our decoder"] / mine,
            limit=1.4,
            at_least=True,
        ),
        Bar(name="webdataset as documented / ours", value=ratios["webdataset, rgb8"] / mine, limit=2.0, at_least=True),
    ]
    if "Energon, rgb8" in ratios:
        bars.append(Bar(name="Energon / ours", value=ratios["Energon, rgb8"] / mine, limit=2.5, at_least=True))
    settings = {
        "batch": BATCH,
        "side": SIDE,
        "samples": SHARDS * PER_SHARD,
        "rounds": args.rounds,
        "batches": args.batches,
    }
    return report("data_peers", settings=settings, ratios={"to the floor": ratios, "runs": found}, bars=bars)


def _child(name: str, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    python = args.energon if name.startswith("Energon") else sys.executable
    command = [
        python,
        "-m",
        "benchmarks.data_peers",
        "--child",
        name,
        "--folder",
        str(folder),
        "--batches",
        str(args.batches),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _prepare_energon(python: str, folder: Path) -> bool:
    """Whether Energon is there; then with a prepared copy of the tars, which its loader asks for."""
    if python == sys.executable and importlib.util.find_spec("megatron.energon") is None:
        print("Energon is not installed here: not measured (--energon PYTHON names an interpreter that has it)")
        return False
    target = folder / "energon"
    target.mkdir()
    for path in tars(folder):
        (target / Path(path).name).symlink_to(path)
    command = [python, "-m", "megatron.energon.cli.main", "prepare", str(target), "--non-interactive", "--split-ratio", "1,0,0",
               "--sample-type", "CaptioningSample", "--field-map", '{"image": "jpg", "caption": "txt"}']  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    return True


if __name__ == "__main__":
    sys.exit(main())

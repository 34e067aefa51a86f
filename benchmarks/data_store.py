"""Throughput of a stream from an object store against the same stream from the folder: `python -m benchmarks.data_store`.

The store is `object_server` in a process of its own on this machine; samples are latents with a caption, 19 KB, so that little
is decoded. A consumer takes a batch of 64 every 60 ms (1,070 a second: two GPUs of the target run) as training does; local and
remote take turns. As fast as the processor allows (--step 0) says more of it than of reading: it also runs the server.

Bars: at least 0.9 of local with 20 and 100 ms latency, whole blocks and samples alone; and with 5 % of 503, 1 % of broken
connections and one request in 1000 a hundred times as slow at least 0.9 of the same without (E11). Each event is counted.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.timing import Bar, report
from data_pipeline.loader import StreamingLoader
from data_pipeline.manifest import open_view
from data_pipeline.prepare import RawMembers, write_shards
from data_pipeline.store.ahead import Reading

GLOBAL_BATCH = 64
BAR = 0.9


@dataclass(frozen=True)
class Noise:
    """Latents (8, 32, 32) float16 beside captions: 19 KB a sample in the tar."""

    num: int

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int, /) -> RawMembers:
        content = io.BytesIO()
        np.save(content, np.random.default_rng(index).standard_normal((8, 32, 32)).astype(np.float16))
        members = {"latent.npy": content.getvalue(), "txt": f"caption {index}".encode()}
        return RawMembers(key=f"{index:08d}", members=members)


@contextmanager
def served(folder: Path, **rates: float) -> Iterator[str]:
    """URL of a server of this folder in a process of its own."""
    words = [word for key, value in rates.items() for word in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "benchmarks.object_server", str(folder), *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.terminate()


class Consumer:
    """A training loop that takes a batch every `step` seconds at most, as a GPU does."""

    def __init__(self, place: str, *, reading: Reading, step: float) -> None:
        self.loader = StreamingLoader(
            open_view(place), global_batch=GLOBAL_BATCH, seed=1, threads=2, prefetch=4, reading=reading
        )
        self._step = step

    def run(self, steps: int) -> float:
        """Samples a second."""
        began = time.perf_counter()
        for _ in range(steps):
            at = time.perf_counter()
            next(self.loader)
            time.sleep(max(0.0, self._step - (time.perf_counter() - at)))
        return steps * GLOBAL_BATCH / (time.perf_counter() - began)


@dataclass(frozen=True, kw_only=True)
class Case:
    """What the server does, and how it is read."""

    rates: dict[str, float]
    reading: Reading


def compare(folder: Path, cases: dict[str, Case], *, rounds: int, steps: int, step: float) -> dict:
    """Every case and the folder itself in turns."""
    found: dict[str, list[float]] = {"local": [], **{name: [] for name in cases}}
    servers = {name: served(folder, **case.rates) for name, case in cases.items()}
    places = {"local": str(folder)} | {name: server.__enter__() for name, server in servers.items()}
    consumers = {
        name: Consumer(place, reading=cases[name].reading if name in cases else Reading(), step=step)
        for name, place in places.items()
    }
    try:
        for consumer in consumers.values():
            consumer.run(steps)  # first indexes and blocks
        for _ in range(rounds):
            for name, consumer in consumers.items():
                found[name].append(consumer.run(steps))
        stats = {name: consumer.loader.stats() for name, consumer in consumers.items()}
    finally:
        for consumer in consumers.values():
            consumer.loader.close()
        for server in servers.values():
            server.__exit__(None, None, None)
    middle = {name: statistics.median(rates) for name, rates in found.items()}
    return {
        name: {
            "samples_per_s": round(middle[name]), "of_local": round(middle[name] / middle["local"], 3),
            "requests": one.requests, "amplification": round(one.bytes_fetched / max(1, one.bytes_read), 3),
            "trouble": dict(one.store_trouble), "retries": one.read_retries, "hedged": one.hedged,
            "hedges_won": one.hedges_won, "most_held_mb": round(one.most_held / 1e6, 1),
        }
        for name, one in stats.items()
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=32)
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--in-flight", type=int, default=192, help="of samples alone; blocks are 32 at a time")
    parser.add_argument(
        "--step", type=float, default=0.06, help="seconds that a consumer's step takes; 0: as fast as it can"
    )
    args = parser.parse_args(argv)
    faults = {"unavailable": 0.05, "resets": 0.01, "slow": 0.001}
    blocks, alone = Reading(block=1 << 20), Reading(in_flight=args.in_flight, budget=16 << 20)
    cases = {
        f"{what}, {latency * 1000:.0f} ms{', faults' if more else ''}": Case(
            rates={"latency": latency, **more}, reading=reading
        )
        for what, reading in (("blocks", blocks), ("samples", alone))
        for latency, more in ((0.02, {}), (0.1, {}), (0.02, faults))
    }
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Noise(args.shards * args.samples), folder, samples_per_shard=args.samples)
        found = compare(Path(folder), cases, rounds=args.rounds, steps=args.steps, step=args.step)
    print(json.dumps(found, indent=1))
    clean = [figures["of_local"] for name, figures in found.items() if "faults" not in name]
    faulty = [
        found[f"{what}, 20 ms, faults"]["samples_per_s"] / found[f"{what}, 20 ms"]["samples_per_s"]
        for what in ("blocks", "samples")
    ]
    bars = [
        Bar(name="a store with latency / its folder", value=min(clean), limit=BAR, at_least=True),
        Bar(name="E11: a store with faults / without", value=min(faulty), limit=BAR, at_least=True),
    ]
    return report("data_store", settings=vars(args), ratios=found, bars=bars)


if __name__ == "__main__":
    sys.exit(main())

"""What the loader's place costs, and what its order is like: `python -m benchmarks.data_state`.

- E5: bytes of the state on 1 to 1024 ranks, of 1 to 64 sources, at the start and far on. Bar: 1 KB, the same on every rank.
- E6: CPU time from nothing to the first batch, at 90 % of an epoch over that at its start, in turns. Bar: 1.2.
- E9: of 1024 shards and a global batch of 4096, how often two samples of a batch are of one shard, over what chance does; and how
  often a shard is read by the 64 ranks of an epoch. Bars: 1.1 each.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.data_paths import Samples
from benchmarks.data_setup import write_set
from benchmarks.timing import Bar, report
from data_pipeline.loader import StreamingLoader
from data_pipeline.manifest import View, open_view
from data_pipeline.order import Order
from data_pipeline.prepare import write_shards
from data_pipeline.sources import DataSet, Named, open_data

WORLDS = (1, 8, 64, 1024)


def state_bytes(*, sources: tuple[int, ...] = (1, 8, 64), worlds: tuple[int, ...] = WORLDS) -> dict[str, int]:
    """Of the states of all these runs the largest, and how many differ among the ranks of one place; 0 is right."""
    largest = unequal = 0
    with tempfile.TemporaryDirectory() as folder:
        for number in range(max(sources)):
            (Path(folder) / str(number)).mkdir()
            write_set(Path(folder) / str(number), shards=100 + number, samples=1000)
        for count in sources:
            named = {f"source_{n}": Named(shards=f"{folder}/{n}", weight=1.0 + n % 3) for n in range(count)}
            data = open_data(named, check_files=False)
            # An epoch or a far step may be in the state as a larger number.
            for step in (0, 12_345_678):
                states = [
                    _state(data, step=step, rank=rank, world=world)
                    for world in worlds
                    for rank in sorted({0, world // 2, world - 1})
                ]
                largest = max(largest, *map(len, states))
                unequal += len(set(states)) - 1
    return {"largest": largest, "unequal": unequal}


def _state(data: DataSet, *, step: int, rank: int, world: int) -> bytes:
    loader = StreamingLoader(data, global_batch=4096, rank=rank, world=world, threads=0)
    state = loader.state_dict()
    loader.load_state_dict({**state, "step": step})
    found = json.dumps(loader.state_dict(), sort_keys=True).encode()
    loader.close()
    return found


def resume(*, samples: int, rounds: int) -> dict[str, float]:
    """CPU milliseconds from a saved place to its first batch."""
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Samples("jpeg", samples), folder, samples_per_shard=samples // 16)
        view = open_view(folder)
        first: dict[float, list[float]] = {0.0: [], 0.9: []}
        for _ in range(rounds + 1):
            for part, times in first.items():
                times.append(_to_first_batch(view, part=part))
    start, late = (times[1:] for times in first.values())  # the first of each warms up
    ratio = median(b / a for a, b in zip(start, late, strict=True))
    return {"at_0_ms": 1e3 * median(start), "at_90_ms": 1e3 * median(late), "ratio": ratio}


def _to_first_batch(view: View, *, part: float) -> float:
    began = time.process_time()
    loader = StreamingLoader(view, global_batch=32, threads=0)
    loader.load_state_dict({**loader.state_dict(), "step": int(part * loader.steps_per_epoch)})
    next(loader)
    took = time.process_time() - began
    loader.close()
    return took


def mixing(*, shards: int = 1024, global_batch: int = 4096, world: int = 64, batches: int = 64) -> dict[str, float]:
    """`pair_rate` over that of chance, and `amplification` over an epoch; shards of about 1000 samples."""
    sizes = np.random.default_rng(0).integers(900, 1101, shards)
    order = Order(sizes, seed=0, global_batch=global_batch)
    total = int(sizes.sum())
    ideal = (sizes * (sizes - 1)).sum() / (total * (total - 1))
    steps = np.linspace(0, order.steps_per_epoch - 1, batches).astype(int)
    slots = np.arange(global_batch)
    pairs = []
    for step in steps:
        counts = np.bincount(order.locate(step * global_batch + slots).shard, minlength=shards)
        pairs.append((counts * (counts - 1)).sum() / (global_batch * (global_batch - 1)))
    reads = np.zeros((world, shards), bool)
    of_rank = slots // (global_batch // world)
    for step in range(order.steps_per_epoch):
        reads[of_rank, order.locate(step * global_batch + slots).shard] = True
    return {"pair_rate": float(np.mean(pairs) / ideal), "amplification": float((reads @ sizes).sum() / total)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args(argv)
    state, first, order = state_bytes(), resume(samples=args.samples, rounds=args.rounds), mixing()
    bars = [
        Bar(name="E5: bytes of the state", value=state["largest"], limit=1024, at_least=False),
        Bar(name="E5: states that differ between ranks", value=state["unequal"], limit=0, at_least=False),
        Bar(name="E6: first batch at 90 % / at 0 %", value=first["ratio"], limit=1.2, at_least=False),
        Bar(name="E9: pairs of one shard / by chance", value=order["pair_rate"], limit=1.1, at_least=False),
        Bar(name="E9: read amplification", value=order["amplification"], limit=1.1, at_least=False),
    ]
    return report("data_state", settings=vars(args), ratios={"E5": state, "E6": first, "E9": order}, bars=bars)


if __name__ == "__main__":
    sys.exit(main())

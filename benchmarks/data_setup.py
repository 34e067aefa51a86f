"""What the start of a run on a large data set costs one rank: opening the manifest, the order, the first place in it, the state.

    python -m benchmarks.data_setup --shards 1200000 --samples 1000

The set is a manifest alone: no tar is read before the first batch, and whether all are there is asked by one rank.
Target E8: at most 1 CPU-second and 100 MB for 1.2 billion samples in 1.2 million shards, manifest included.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.timing import Bar, report
from data_pipeline import table
from data_pipeline.manifest import HISTORY, MANIFEST, _write_table

LOOK = """
import json, resource, sys, time
import numpy as np
from data_pipeline import commit, feistel, sources
from data_pipeline.manifest import open_view
def rss():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
before, began, top = rss(), time.process_time(), peak()
view = open_view(sys.argv[1], check_files=False)
opened = time.process_time()
data = sources.DataSet.of(view)
stream = data.stream(seed=0, global_batch=4096)
located = stream.locate(123_456 * 4096 + np.arange(64))
state = {"v": 1, "step": 0, **stream.identity(), **data.identity(global_batch=4096)}
name = view.shards[int(located.shard[0])].name
print(json.dumps({
    "cpu_seconds": time.process_time() - began, "of_it_manifest": opened - began,
    "added_mb": (rss() - before) / 1e6, "added_peak_mb": (peak() - top) / 1e6,
    "state_bytes": len(json.dumps(state)), "first": name, "samples": view.num_samples,
}))
"""


def write_set(folder: Path, *, shards: int, samples: int) -> None:
    """A manifest of so many shards of so many samples, without the tars."""
    names = [f"shard-{number:07d}.tar".encode() for number in range(shards)]
    columns = table.Columns(
        field_sets=(("jpg", "txt", "json"),),
        fields=np.zeros(shards, np.uint16),
        samples=np.full(shards, samples, np.uint32),
        name_end=np.cumsum([len(name) for name in names], dtype=np.uint64),
        bytes=np.full(shards, samples * 21_900, np.uint64),
        sha256=np.random.default_rng(0).integers(0, 256, (shards, 32), dtype=np.uint8),
        names=memoryview(b"".join(names)),
    )
    content = {"version": 2, "meta": {}, "table": _write_table(folder, columns)}
    (folder / MANIFEST).write_text(json.dumps(content))


def measure(folder: Path) -> dict[str, float]:
    """In a process of its own, whose memory nobody else has touched."""
    run = subprocess.run([sys.executable, "-c", LOOK, folder], check=True, capture_output=True, text=True)
    return json.loads(run.stdout)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=1_200_000)
    parser.add_argument("--samples", type=int, default=1000, help="a shard")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        write_set(Path(folder), shards=args.shards, samples=args.samples)
        size = sum(path.stat().st_size for path in (Path(folder) / HISTORY).iterdir())
        found = {**measure(Path(folder)), "table_mb": size / 1e6}
    print(json.dumps(found, indent=1))
    bars = [
        Bar(name="E8: CPU seconds of the set-up", value=found["cpu_seconds"], limit=1.0, at_least=False),
        Bar(name="E8: MB that it adds at its peak", value=found["added_peak_mb"], limit=100.0, at_least=False),
    ]
    return report("data_setup", settings=vars(args), ratios=found, bars=bars)


if __name__ == "__main__":
    sys.exit(main())

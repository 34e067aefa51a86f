"""What a checkpoint costs at 512 ranks besides its bytes, and how many bytes it reads: M-64E (97B, 64 experts) with AdamW
and moving average, the shipped code on simulated ranks.

    python -m benchmarks.checkpoint_scale

planning   describing what a rank holds, agreeing on who writes what, laying out its file: CPU seconds and peak MB on the worst
           of some ranks. Messages of the other 511 ranks are made beforehand; sending is not counted, decoding is.
save       what is left of a later save: describing again, header, and on rank 0 looking at all files and writing the manifest.
load       manifest, comparison with the targets, where every byte lies.
reading    bytes read, whole checksum blocks and checksums included, over bytes wanted, when another layout loads what one wrote.
           And a load on one rank against reading the same files into one buffer: wall clock of a machine that others use too.

Tensors have no memory here (a view of one element); files are as large as they would be, and empty.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import Replicate, Shard

from ecdit_train import checkpoint
from ecdit_train.checkpoint import manifest, reading, restore, store
from ecdit_train.checkpoint import plan as planning
from ecdit_train.checkpoint.layout import TensorSlice
from ecdit_train.checkpoint.rank_file import file_name, sums_name
from ecdit_train.checkpoint.sums import sums_bytes
from ecdit_train.config.compose import compose
from ecdit_train.parallel.degrees import Degrees
from ecdit_train.parallel.placement import ParamPlacement, chunk_bounds, pieces_of
from ecdit_train.parallel.runtime import encode_json
from ecdit_train.parallel.tensor_parallel import split_of
from ecdit_train.plan import parameters

from .timing import Bar, report

STATE = ("ema", "model", "optim.exp_avg", "optim.exp_avg_sq")
HEAD_DIM = 64
WORLD = 512


def degrees(world: int, *, tp: int = 1, ep: int = 1, replicate: int = 1) -> Degrees:
    return Degrees(world=world, dp_replicate=replicate, dp_shard=world // tp // replicate, tp=tp, ep=ep)


class Network:
    """The parameters of M-64E and where each lies on a rank of some layout."""

    def __init__(self) -> None:
        self.config = compose(["experiment=ec_dit_m_64e"], local=False)
        self.shapes = parameters.count(self.config).shapes

    def slices(self, rank: int, at: Degrees, *, each: bool = False) -> list[TensorSlice]:
        """Everything that a rank holds, in name order. `each`: find out anew for each tensor, as a run has to (but for
        the four parts of the state)."""
        one = torch.zeros(())
        alike: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        found = []
        for name, shape in self.shapes:
            kind = (shape, ".experts." in name, split_of(name.removesuffix(".weight")))
            if kind not in alike:
                placement, mesh, coordinate, cuts = self._lies(name, shape, rank, at)
                part = list(shape)
                part[placement.dim] = sum(run.size for run in placement.runs())
                here = list(part)
                for size, index, cut in zip(mesh, coordinate, cuts, strict=True):
                    if isinstance(cut, Shard):
                        start, stop = chunk_bounds(here[cut.dim], index=index, count=size)
                        here[cut.dim] = stop - start
                pieces = pieces_of(
                    one.expand(here), part_shape=part, mesh_shape=mesh, coordinate=coordinate, placements=cuts,
                    placement=placement,
                )  # fmt: skip
                alike[kind] = tuple(pieces)
            found += [
                TensorSlice(name=f"{part}/{name}", global_shape=shape, dtype=torch.float32, pieces=alike[kind])
                for part in STATE
            ]
            if each:
                alike.clear()
        return sorted(found, key=lambda s: s.name)

    def _lies(self, name: str, shape: tuple[int, ...], rank: int, at: Degrees) -> Any:
        """(placement, mesh shape, coordinate, cuts), as `parallel` would have it."""
        whole = ParamPlacement(global_shape=shape)
        if ".experts." in name:
            edp_rank, ep_rank = at.sparse(rank)
            here = (shape[0] // at.ep, *shape[1:])
            dim = next((d for d, n in enumerate(here) if n % at.edp == 0), 0)
            return replace(whole, index=ep_rank, count=at.ep), (at.edp,), (edp_rank,), (Shard(dim),)
        replica, shard, tp_rank = at.dense(rank)
        split = split_of(name.removesuffix(".weight"))
        if split is not None:
            whole = replace(whole, dim=0 if split == "column" else 1, index=tp_rank, count=at.tp)
        return whole, (at.dp_replicate, at.dp_shard), (replica, shard), (Replicate(), Shard(0))


class Chorus:
    """One rank among many whose words are known: every exchange decodes what all of them say."""

    def __init__(self, rank: int, world: int, said: list[list[bytes]]) -> None:
        self.rank, self.world, self._said, self._turn = rank, world, said, 0

    def all_gather_json(self, value: Any) -> list[Any]:
        others = self._said[self._turn] if self._turn < len(self._said) else [encode_json(value)] * self.world
        self._turn += 1
        return [json.loads(words) if rank != self.rank else value for rank, words in enumerate(others)]


def words_of(tables: list[planning.Table]) -> list[list[bytes]]:
    """What all ranks say in the two exchanges of `agree_on_plan`."""
    digests = [[planning._digest(part) for part in (t.names, t.which, t.cuts)] for t in tables]
    kinds: dict[tuple[str, str], int] = {}
    for rank, (names, which, _) in enumerate(digests):
        kinds.setdefault((names, which), rank)
    speak = set(kinds.values()) if len(kinds) > 1 else set()
    second = [encode_json([[t.cuts, t.which if r in speak else None, None], None]) for r, t in enumerate(tables)]
    return [[encode_json([[*said, ""], None]) for said in digests], second]


def measured(work: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """CPU seconds of one run and peak MB of another."""
    start = time.process_time()
    result = work()
    seconds = time.process_time() - start
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    return {"cpu_s": round(seconds, 3), "peak_mb": round(peak, 1)}, result


def worst(rows: list[dict[str, float]]) -> dict[str, float]:
    return {key: max(row[key] for row in rows) for key in rows[0]}


def empty_files(plan: planning.SavePlan, folder: Path) -> list[dict[str, Any]]:
    """Every rank's files at their size, and what its report would say."""
    told = []
    plan.files.prepare(range(plan.world))
    for rank in range(plan.world):
        data = plan.files.data_bytes(rank)
        nbytes = 0 if data == 0 else data + 65_536
        for name, size in ((file_name(rank), nbytes), (sums_name(rank), sums_bytes(nbytes))) if nbytes else ():
            with open(folder / name, "wb") as file:
                file.truncate(size)
        told.append({"header": 65_536, "nbytes": nbytes, "sums": "0" * 64, "copies": {"0": "0" * 32}})
    return told


def planning_and_load(network: Network, at: Degrees, ranks: list[int]) -> dict[str, Any]:
    """The parts of a save and a load on some ranks, each at its worst."""
    tables = [planning.to_table(network.slices(rank, at)) for rank in range(at.world)]
    words = words_of(tables)
    rows: dict[str, list[dict[str, float]]] = {"planning": [], "save": [], "load": []}
    with tempfile.TemporaryDirectory() as scratch:
        for rank in ranks:

            def plan_it(rank: int = rank) -> planning.SavePlan:
                described = checkpoint.layout.describe_all({s.name: s for s in network.slices(rank, at, each=True)})
                plan = planning.agree_on_plan(described, comm=Chorus(rank, at.world, words))
                plan.chunks_of(rank)
                return plan

            row, plan = measured(plan_it)
            rows["planning"].append(row)
            root = Path(scratch) / str(rank)
            temporary = root / f"step_00000001.tmp-{'0' * 32}"
            temporary.mkdir(parents=True)
            told = empty_files(plan, temporary) if rank == 0 else []

            def save_it(
                rank: int = rank, plan: planning.SavePlan = plan,
                temporary: Path = temporary, told: list[dict[str, Any]] = told, root: Path = root,
            ) -> None:  # fmt: skip
                described = checkpoint.layout.describe_all({s.name: s for s in network.slices(rank, at, each=True)})
                planning.to_table(described)
                part = store._part(temporary, plan=plan, rank=rank, compare=True)
                begun = store.Save(
                    final=root / "step_00000001", temporary=temporary, home=checkpoint.folder.Home.make(root), step=1,
                    objects={}, lineage=None, comm=Chorus(rank, at.world, []), replicas="refuse", plan=plan,
                    slices=tuple(described), part=part,
                )  # fmt: skip
                begun.views()
                if rank == 0:
                    if begun.final.exists():
                        begun.final.rename(temporary)
                        (temporary / manifest.NAME).unlink()
                    store._commit(begun, told=[json.loads(encode_json(said)) for said in told], still_ours=lambda: None)

            rows["save"].append(measured(save_it)[0])
        path = Path(scratch) / "0" / "step_00000001"
        for rank in ranks:

            def load_it(rank: int = rank) -> reading.Needed:
                slices = checkpoint.layout.describe_all({s.name: s for s in network.slices(rank, at, each=True)})
                described = manifest.read(path)
                assert not any(restore._differences(slices, described=described, skip=()).values())
                return reading.needed(slices, described=described)

            rows["load"].append(measured(load_it)[0])
        size = (path / manifest.NAME).stat().st_size
    exchanged = sum(len(w) for w in words[0]) + sum(len(w) for w in words[1])
    return {name: worst(found) for name, found in rows.items()} | {
        "manifest_mb": round(size / 1e6, 2),
        "gathered_mb": round(exchanged / 1e6, 2),
        "patterns": len(plan.patterns),
        "tensors": len(plan.entries),
    }


def described_by(network: Network, at: Degrees) -> manifest.Manifest:
    """The description of what a layout would write."""
    tables = [planning.to_table(network.slices(rank, at)) for rank in range(at.world)]
    plan = planning.make_plan([(t, t.cuts) for t in tables])
    plan.files.prepare(range(at.world))
    ranks = {
        rank: manifest.RankFile(header=65_536, nbytes=plan.files.data_bytes(rank) + 65_536, sums_sha256="0" * 64)
        for rank in range(at.world)
    }
    return manifest.Manifest(
        version=2, step=1, id="0", world=at.world, torch_version="", lineage=None, objects={}, sha256="",
        entries=plan.entries, patterns=plan.patterns, layout=plan.files, ranks=ranks,
    )  # fmt: skip


def amplification(network: Network, source: Degrees, target: Degrees, ranks: list[int]) -> dict[str, float]:
    """Bytes read over bytes wanted, all of some ranks together; CPU seconds of finding out where everything lies, and files
    opened, on the worst."""
    described = described_by(network, source)
    wanted = read = 0
    seconds, opened = [], []
    for rank in ranks:
        slices = network.slices(rank, target)
        start = time.process_time()
        needs = reading.needed(slices, described=described)
        seconds.append(time.process_time() - start)
        sums = {file: described.sums_of(Path(), file) for file in needs}
        found = reading.extents(needs, sums=sums)
        opened.append(len(needs))
        wanted += sum(p.box.volume * s.dtype.itemsize for s in slices for p in s.pieces)
        read += sum(e.stop - e.start + sums_bytes(e.stop - e.start) for e in found)
    return {"read_over_wanted": round(read / wanted, 3), "cpu_s": round(max(seconds), 3), "files": max(opened)}


def load_over_raw(*, rounds: int = 9, mb: int = 384) -> dict[str, float]:
    """A load on one rank against reading its files into one buffer that is used again and again: wall clock, from the disk (the
    page cache is told to forget them) and from the page cache."""
    folder = Path(tempfile.mkdtemp())
    try:
        tensors = {f"w{n:02}": torch.randn(mb * 2**18 // 12 // 1024, 1024) for n in range(12)}
        path = checkpoint.save(folder, step=1, tensors=tensors, objects={}).path
        targets = {name: torch.zeros_like(t) for name, t in tensors.items()}
        buffer = memoryview(bytearray(8 * 2**20))

        def forget() -> None:
            for file in path.glob("rank_*"):
                descriptor = os.open(file, os.O_RDONLY)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)

        def raw() -> None:
            for file in sorted(path.glob("rank_*")):
                descriptor = os.open(file, os.O_RDONLY)
                while os.readv(descriptor, [buffer]):
                    pass
                os.close(descriptor)

        def load() -> None:
            checkpoint.load(path, targets=targets)

        seconds: dict[tuple[str, str], list[float]] = {}
        for n in range(rounds + 1):
            for where, before in (("disk", forget), ("cache", lambda: None)):
                for what, work in (("raw", raw), ("load", load)):
                    before()
                    start = time.perf_counter()
                    work()
                    if n:
                        seconds.setdefault((where, what), []).append(time.perf_counter() - start)
        # Least of all rounds: others use this machine too, and they only ever add.
        best = {key: min(values) for key, values in seconds.items()}
        return {
            "disk_load_over_raw": round(best["disk", "load"] / best["disk", "raw"], 2),
            "cache_load_over_raw": round(best["cache", "load"] / best["cache", "raw"], 2),
            "disk_raw_gb_s": round(mb * 2**20 / best["disk", "raw"] / 1e9, 2),
            "cache_raw_gb_s": round(mb * 2**20 / best["cache", "raw"] / 1e9, 2),
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main(argv: list[str] | None = None) -> int:
    network = Network()
    ranks = [0, 77, 511]
    layouts = {
        "fsdp 512, ep 64": degrees(WORLD, ep=64),
        "fsdp 512": degrees(WORLD),
        "fsdp 128 x tp 4, ep 64": degrees(WORLD, tp=4, ep=64),
        "2 copies of fsdp 256, ep 64": degrees(WORLD, replicate=2, ep=64),
    }
    costs = {name: planning_and_load(network, at, ranks) for name, at in layouts.items()}
    rows = degrees(64)
    cuts = {
        "rows/64 -> rows/512": (rows, degrees(WORLD)),
        "rows/64 -> rows/512, ep 64": (rows, degrees(WORLD, ep=64)),
        "ep 64, edp 8 -> ep 8, edp 64": (degrees(WORLD, ep=64), degrees(WORLD, ep=8)),
        "ep 8, edp 64 -> ep 64, edp 8": (degrees(WORLD, ep=8), degrees(WORLD, ep=64)),
        "rows/512, ep 64 -> tp 4, ep 64": (degrees(WORLD, ep=64), degrees(WORLD, tp=4, ep=64)),
        "tp 4, ep 64 -> rows/512, ep 64": (degrees(WORLD, tp=4, ep=64), degrees(WORLD, ep=64)),
        "rows/512, ep 64 -> rows/64": (degrees(WORLD, ep=64), rows),
    }
    reads = {
        name: amplification(network, source, target, [r for r in ranks if r < target.world])
        for name, (source, target) in cuts.items()
    }
    raw = load_over_raw()
    for name, cost in costs.items():
        print(name, cost)
    for name, read in reads.items():
        print(name, read)
    print(raw)
    bars = [
        Bar(name=f"{name}: {part} {key}", value=cost[part][key], limit=limit, at_least=False)
        for name, cost in costs.items()
        for part in ("planning", "save", "load")
        for key, limit in (("cpu_s", 1.0), ("peak_mb", 200.0))
    ]
    bars += [Bar(name=n, value=r["read_over_wanted"], limit=1.2, at_least=False) for n, r in reads.items()]
    bars.append(
        Bar(
            name="load over a raw read from the disk, one rank",
            value=raw["disk_load_over_raw"],
            limit=1.5,
            at_least=False,
        )
    )
    settings = {"model": "ec_dit_m_64e", "state": STATE, "ranks": WORLD, "measured on ranks": ranks}
    return report(
        "checkpoint_scale", settings=settings, ratios={"costs": costs, "reading": reads, "load": raw}, bars=bars
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The parity grid on the device: loss, every gradient, norm and weights after steps of many layouts equal one process on a CPU.

The problem and the comparison are those of tests/dist. One GPU: routers, dispatchers, recomputation and compilation of a world
of one; several (`make gpu-check NPROC=n`): every layout of n ranks over NCCL, under torchrun.

    torchrun --standalone --nproc-per-node 8 -m benchmarks.gpu.grid --device cuda --out FILE
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ecdit_train import atomic
from ecdit_train.model.dispatchers.deterministic import Deterministic
from ecdit_train.model.dispatchers.triton import Triton
from ecdit_train.parallel.runtime import Runtime, start

from .device import Device
from .record import Findings

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests" / "dist"), str(ROOT / "tests")]
WITHIN = 1200
"""Seconds for all ranks."""

Row = tuple[str, float, str]
"""Case, its largest error as a share of the bound (2 at least where choices, copies or records differ), all of its errors."""


def grid(device: Device, found: Findings) -> None:
    """Each case's largest error as a share of its bound."""
    for name, share, words in run_alone(device) if device.ranks == 1 else run_many(device):
        found.values[name] = words
        found.at_most(f"{device.ranks} ranks, {name}", share, 1.0)


def run_alone(device: Device) -> list[Row]:
    here = start(device.kind, env={})
    try:
        with device.compiling():
            return errors(here, alone(device))
    finally:
        here.shutdown()


def run_many(device: Device) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "errors.json"
        torchrun = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(device.ranks),
        ]
        words = ["-m", "benchmarks.gpu.grid", "--device", device.kind, "--out", str(out)]
        done = subprocess.run([*torchrun, *words], cwd=ROOT, capture_output=True, text=True, timeout=WITHIN)
        if done.returncode != 0:
            raise RuntimeError(f"torchrun ended with {done.returncode}:\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}")
        return [(name, share, words) for name, share, words in json.loads(out.read_text())]


def alone(device: Device) -> list[Any]:
    """Cases of one rank. fp64 goes through the kernels' twins, fp32 through the kernels."""
    from dist_cases import CAPPED, DENSE, MOE, RACE, THRESHOLD, TOKEN_CHOICE, case

    fixed = [dataclasses.replace(MOE, dispatcher=made(cap=None)) for made in (Deterministic, Triton)]
    cases = [case(moe=moe, dtype=dtype) for moe in (MOE, *fixed) for dtype in ("float64", "float32")]
    cases += [
        case(moe=DENSE, optim="adamw"),
        case(moe=TOKEN_CHOICE),
        case(moe=THRESHOLD),
        case(moe=CAPPED),
        case(moe=RACE),
    ]
    cases += [case(ac=mode, dtype="float32") for mode in ("full", "selective")]
    return cases + device.choose(cuda=[case(compiled=True, dtype="float32")], cpu=[])


def layouts(world: int, *, few: bool) -> list[Any]:
    """Cases of `world` ranks: every pair of axes that divides, in fp64, and each axis in fp32; `few` of them on a CPU."""
    from dist_cases import DENSE, MOE, TOKEN_CHOICE, case

    triton = dataclasses.replace(MOE, dispatcher=Triton(cap=None))
    degrees = [n for n in (1, 2, 4, 8) if world % n == 0]
    if few:
        return [case(ep=world), case(ep=world, moe=triton, dtype="float32")]
    cases = [
        case(tp=tp, ep=ep, rep=rep)
        for tp in degrees
        if tp <= 2
        for ep in degrees
        for rep in degrees
        if rep <= 2 and world % (tp * rep) == 0
    ]
    cases += [case(ep=ep, moe=moe, dtype="float32") for ep in degrees for moe in (MOE, TOKEN_CHOICE, triton)]
    cases += [
        case(ep=world, chunks=2),
        case(ep=world, ac="selective"),
        case(ep=world, reshard=False),
        case(moe=DENSE, tp=2),
    ]
    return [
        *cases,
        case(ep=world, compiled=True, dtype="float32"),
        case(tp=2, ep=world, microbatches=1, dtype="float32"),
    ]


def errors(here: Runtime, cases: list[Any]) -> list[Row]:
    """Of each case on rank 0, nothing on the others."""
    from dist_cases import check_cases
    from test_dist_grid import BOUND_FP32, BOUND_FP32_GRAD, BOUND_FP64

    rows = []
    for name, found in check_cases(here, cases):
        low = "float32" in name
        bound, grad = (BOUND_FP32, BOUND_FP32_GRAD) if low else (BOUND_FP64, BOUND_FP64)
        share = found.worst(bound, grad=grad)
        rows.append((name, share if found.within(bound, grad=grad) else max(share, 2.0), str(found)))
    return rows


def main(arguments: list[str] | None = None) -> None:
    """A rank under torchrun."""
    parser = argparse.ArgumentParser(
        prog="grid", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args(arguments)
    here = start(chosen.device, env=os.environ)
    try:
        with Device(kind=chosen.device).compiling():
            rows = errors(here, layouts(here.world, few=chosen.device == "cpu"))
        if here.rank == 0:
            atomic.write(chosen.out, json.dumps(rows).encode())
        here.barrier()
    finally:
        here.shutdown()


if __name__ == "__main__":
    main()

"""`make gpu-check`: python -m benchmarks.gpu [--device cpu] [--only NAME ...] [--nproc N]

Every check runs in a process of its own, since a fault of the device spoils all that comes after it in one, and is
saved as it ends: benchmarks/results/DATE-gpu_check.json. Exit code 0 where every bar held, 1 where one did not. Without
a GPU it says so and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import timing
from .device import Device
from .record import Check, Findings, Record, good, perform, table

WITHIN = 1800
"""Seconds for a check; compiling for large presets takes minutes."""


def about(device: Device, found: Findings) -> None:
    """The machine."""
    found.values |= device.facts() | {"system": timing.machine()}


def checks() -> dict[str, Check]:
    """What there is, the quick and the telling first. Imported late: each child needs one of them."""
    from . import arithmetic, grid, layers, runs, steps

    return {
        "about": about,
        "parity": arithmetic.parity,
        "bf16": arithmetic.bf16,
        "attention": arithmetic.attention,
        "kernels": arithmetic.kernels,
        "fp8": arithmetic.fp8,
        "grid": grid.grid,
        "waits": runs.waits,
        "graphs": steps.graphs,
        "layers": layers.layers,
        "blocks": layers.blocks,
        "steps": steps.steps,
        "demo": runs.demo,
    }


def child(name: str, device: Device) -> dict[str, Any]:
    """The check's outcome from a process of its own, whatever becomes of that."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "outcome.json"
        words = ["--device", device.kind, "--nproc", str(device.ranks), "--child", name, "--out", str(out)]
        # On a CPU kernels run through Triton's interpreter; elsewhere it would take their place.
        interpret = {"TRITON_INTERPRET": "1"} if name == "kernels" and not device.cuda else {}
        try:
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.gpu", *words],
                timeout=WITHIN,
                cwd=Path(__file__).parents[2],
                env=os.environ | interpret,
            )
            reason = f"its process ended with {done.returncode}"
        except subprocess.TimeoutExpired:
            reason = f"took more than {WITHIN} s"
        if out.exists():
            return json.loads(out.read_text())
    return {"status": "failed", "reason": reason, "seconds": 0, "values": {}, "skipped": {}, "bars": []}


def main(arguments: Sequence[str] | None = None) -> int:
    known = checks()
    parser = argparse.ArgumentParser(
        prog="gpu-check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument(
        "--only", nargs="+", choices=list(known), default=list(known), metavar="NAME", help=", ".join(known)
    )
    parser.add_argument("--nproc", type=int, default=1, help="GPUs for the parity grid")
    parser.add_argument("--child", choices=list(known), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    device = Device(kind=chosen.device, ranks=chosen.nproc)
    if device.cuda and not torch.cuda.is_available():
        print("gpu-check skipped: torch sees no CUDA device here")
        return 0
    if chosen.child:
        chosen.out.write_text(json.dumps(perform(known[chosen.child], device)))
        return 0
    record = Record.open(timing.RESULTS, name="gpu_check") if device.cuda else None
    outcomes: dict[str, Any] = {}
    for name in chosen.only:
        print(f"--- {name}", flush=True)
        try:
            outcomes[name] = child(name, device)
        except Exception:
            outcomes[name] = {
                "status": "failed",
                "reason": traceback.format_exc(),
                "values": {},
                "skipped": {},
                "bars": [],
            }
        if record is not None:
            record.keep(name, outcomes[name])
        print("\n".join(table({name: outcomes[name]})), flush=True)
    bad = [name for name, outcome in outcomes.items() if not good(outcome)]
    print(f"{len(outcomes) - len(bad)} of {len(outcomes)} checks held" + (f"; not: {', '.join(bad)}" if bad else ""))
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())

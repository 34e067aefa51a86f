"""Twenty steps of a tiny run, loss by loss, for each router.

Twice in one process the losses are equal bit for bit. Against the stored file they are equal exactly on the kind of
machine that wrote it (the file's `machine` section: processor, vector units, torch), and to 1e-5 elsewhere: other
vector units sum in another order, and after twenty steps that is all that may have grown from it.
"""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch
from tiny_runs import ROUTERS, configure, live, records

STEPS = 20
FILE = "losses/tiny.txt"


def machine() -> str:
    """What the last bits depend on."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").split("\n\n")[0].splitlines() if path.exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    wanted = ("vendor_id", "cpu family", "model", "stepping")
    processor = " ".join(f"{key} {fields[key]}" for key in wanted if key in fields)
    vectors = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()}, {processor}, {vectors}, torch {torch.__version__.partition('+')[0]}"


def losses(run, shards, *extra: str) -> list[float]:
    steps = (f"train.steps={STEPS}", "checkpoint.every_steps=100")
    assert live(configure(run, shards, *steps, *extra)).finished
    return [line["train/loss"] for line in records(run)]


@pytest.mark.parametrize("router", ROUTERS)
def test_losses(router, tiny_shards, tmp_path, golden, stored, update):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        first, second = (losses(tmp_path / name, tiny_shards, *ROUTERS[router]) for name in ("a", "b"))
    finally:
        torch.set_num_threads(threads)
    assert first == second
    if update or stored(FILE, "machine") == machine() + "\n":
        golden(FILE, section="machine", text=machine())
        golden(FILE, section=router, text="\n".join(map(repr, first)))
    else:
        assert first == pytest.approx([float(line) for line in stored(FILE, router).split()], rel=1e-5)

"""Shared by all tests: a small shapes set, made once. `tiny_runs.py` beside this file makes runs out of it."""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path

import pytest

from data_pipeline.shapes.make import make_shapes

# Tensors here are tiny: threads only wait for each other, and sums would depend on how many there are.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A script's shell starts what it puts into the background deaf to Ctrl-C, and every process below inherits that: tests that send
# SIGINT to a child would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many faults the drills of this run made happen: what their tests gave to `record_property`."""
    done: Counter[str] = Counter()
    for report in terminalreporter.stats.get("passed", []):
        done.update({name: value for name, value in report.user_properties if isinstance(value, int)})
    if done:
        terminalreporter.write_line("faults: " + ", ".join(f"{number} {name}" for name, number in sorted(done.items())))


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 samples of 16 x 16 pixels in 5 shards: an epoch is 25 steps of 8. Read-only; damage a copy."""
    folder = tmp_path_factory.mktemp("tiny-shards")
    make_shapes(folder, count=200, resolution=16, seed=3, samples_per_shard=40)
    return folder

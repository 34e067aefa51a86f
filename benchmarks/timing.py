"""How things are timed here: every variant in one process, shuffled within every round, one thread, process CPU time; a
result is the median over rounds of t(variant) / t(reference) within the same round. Ratios hold on a busy machine,
absolute times do not.
"""

from __future__ import annotations

import ctypes
import datetime
import gc
import json
import math
import platform
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"

Work = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A ratio that has to stay on one side of a limit."""

    name: str
    value: float
    limit: float
    at_least: bool

    @property
    def passed(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        return f"{'pass' if self.passed else 'FAIL'}  {self.name:<58} {self.value:6.3f} {sign} {self.limit:.2f}"


@dataclass(frozen=True, kw_only=True)
class Times:
    """CPU seconds of each variant of one case, round by round."""

    seconds: dict[str, list[float]]

    @property
    def rounds(self) -> int:
        return min(map(len, self.seconds.values()))

    def ratio(self, variant: str, reference: str) -> float:
        return median(self._ratios(variant, reference))

    def spread(self, variant: str, reference: str) -> float:
        """Interquartile range of the ratio."""
        low, _, high = quantiles(self._ratios(variant, reference), n=4)
        return high - low

    def _ratios(self, variant: str, reference: str) -> list[float]:
        return [a / b for a, b in zip(self.seconds[variant], self.seconds[reference], strict=True)]


LEAST_ROUNDS = 3


def interleave(
    cases: dict[str, dict[str, Work]], *, rounds: int, seconds: float = math.inf, seed: int = 0
) -> dict[str, Times]:
    """Times every variant of every case once per round: cases in shuffled order, variants shuffled within each. After `seconds` of
    wall time no other round begins, once there are three."""
    shuffle, began = random.Random(seed).shuffle, time.monotonic()
    times: dict[str, Times] = {case: Times(seconds={v: [] for v in variants}) for case, variants in cases.items()}
    for number in range(-1, rounds):  # round -1 warms up
        if number >= LEAST_ROUNDS and time.monotonic() - began > seconds:
            break
        order = list(cases)
        shuffle(order)
        for case in order:
            variants = list(cases[case])
            shuffle(variants)
            for variant in variants:
                gc.collect()
                start = time.process_time()
                cases[case][variant]()
                if number >= 0:
                    times[case].seconds[variant].append(time.process_time() - start)
    return times


def settle() -> None:
    """One thread, and freed memory stays with the process, as it does under a GPU's caching allocator: page faults of
    large buffers are the kernel's time, vary with what else runs, and would be a third of a layer's."""
    torch.set_num_threads(1)
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def machine() -> dict[str, Any]:
    """What a reader needs to judge a result; nothing that names the machine."""
    model = "unknown"
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    return {
        "cpu": model,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "threads": torch.get_num_threads(),
    }


def fast_in_bf16() -> bool:
    """Whether this CPU multiplies bf16 matrices by instructions of their own; without them torch takes many times fp32's time."""
    return any(
        getattr(torch.cpu, name, lambda: False)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )


def read_bars(name: str) -> list[Bar]:
    """Those of today's `report`."""
    content = json.loads((RESULTS / f"{_today()}-{name}.json").read_text(encoding="utf-8"))
    return [Bar(**{field: bar[field] for field in ("name", "value", "limit", "at_least")}) for bar in content["bars"]]


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def report(name: str, *, settings: dict[str, Any], ratios: dict[str, Any], bars: list[Bar]) -> int:
    """Print the bars, write `results/<date>-<name>.json`, return the exit code."""
    print()
    for bar in bars:
        print(bar)
    RESULTS.mkdir(exist_ok=True)
    today = _today()
    content = {
        "name": name,
        "date": today,
        "machine": machine(),
        "settings": settings,
        "ratios": ratios,
        "bars": [asdict(bar) | {"passed": bar.passed} for bar in bars],
    }
    (RESULTS / f"{today}-{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    missed = sum(not bar.passed for bar in bars)
    print(f"{len(bars) - missed} of {len(bars)} bars held" + (f", {missed} missed" if missed else ""))
    return 1 if missed else 0

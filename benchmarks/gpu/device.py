"""The one seam between the checks and CUDA: time, memory, waits, and how large a check may be."""

from __future__ import annotations

import contextlib
import functools
import gc
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Literal, TypeVar
from unittest import mock

import torch

T = TypeVar("T")

WAITS = "called a synchronizing CUDA operation"
"""How torch's sync debug mode begins its warning."""


@dataclass(frozen=True, kw_only=True)
class Device:
    kind: Literal["cuda", "cpu"]
    ranks: int = 1
    """Devices that the parity grid runs on."""

    @property
    def cuda(self) -> bool:
        return self.kind == "cuda"

    def choose(self, *, cuda: T, cpu: T) -> T:
        """The size of a check: what is real on a GPU, and what a test can bear."""
        return cuda if self.cuda else cpu

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """torch.compile as it is on a GPU; on a CPU, where inductor would take minutes, graphs are cut alike and not compiled."""
        if self.cuda:
            yield
        else:
            with mock.patch.object(torch, "compile", functools.partial(torch.compile, backend="eager")):
                yield

    def facts(self) -> dict[str, object]:
        """What a reader needs to judge the figures."""
        found: dict[str, object] = {"torch": torch.__version__, "device": "cpu"}
        if self.cuda:
            shown = torch.cuda.get_device_properties(0)
            found |= {"device": shown.name, "memory": shown.total_memory, "count": torch.cuda.device_count()}
            found |= {"cuda": torch.version.cuda, "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
        return found

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, works: Mapping[str, Callable[[], object]], *, rounds: int, calls: int = 1) -> dict[str, float]:
        """Median seconds of one call of each, interleaved round by round after two warm ones. The device is waited for
        around `calls` calls, so that launches overlap with work as they do in a step."""
        times: dict[str, list[float]] = {name: [] for name in works}
        for number in range(-2, rounds):
            for name, work in works.items():
                self.synchronize()
                began = time.perf_counter()
                for _ in range(calls):
                    work()
                self.synchronize()
                if number >= 0:
                    times[name].append((time.perf_counter() - began) / calls)
        return {name: median(t) for name, t in times.items()}

    def forget_peak(self) -> None:
        gc.collect()  # modules that FSDP wraps refer to themselves
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int | None:
        """Most bytes of live tensors since `forget_peak`; None where nobody counts."""
        return torch.cuda.max_memory_allocated() if self.cuda else None

    @contextlib.contextmanager
    def waits(self) -> Iterator[Counter[str]]:
        """Counts the waits for the device inside, by the file and line that waited; none on a CPU.

        The mode warns rather than raises, so that one pass finds all places.
        """
        places: Counter[str] = Counter()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if self.cuda:
                torch.cuda.set_sync_debug_mode("warn")
            try:
                yield places
            finally:
                if self.cuda:
                    torch.cuda.set_sync_debug_mode("default")
        places.update(f"{w.filename}:{w.lineno}" for w in caught if WAITS in str(w.message))

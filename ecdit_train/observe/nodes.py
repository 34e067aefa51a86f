"""What the machines of a run do, by number and without their names: node 0 is rank 0's.

Looked at when a record is due, on one rank of each node, by asking counters of the kernel and of NVIDIA's driver; the numbers
travel with the sums of `MetricWindow` in the exchange that a record makes anyway. What nobody can say here is left out.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .memory import GIB
from .metrics import Sums

FIELDS = (("perf", "cpu_frac"), ("mem", "host_gib"), ("perf", "gpu_frac"), ("mem", "gpu_gib"))
MOST = 64
"""Nodes with names of their own; of more, only the least, the mean and the most."""
KEY = "nodes"
"""Of the sums: (nodes * (1 + FIELDS),), of each node whether it was asked, and its numbers, NaN where it cannot say."""


def node_key() -> str:
    """The same on all ranks of a machine; its name cannot be read from it."""
    return hashlib.sha256(f"ecdit {socket.gethostname()}".encode()).hexdigest()[:16]


class Nodes:
    """This rank's part in it."""

    def __init__(self, said: Sequence[Sequence[Any]], *, rank: int, device: torch.device) -> None:
        """`said`: of every rank in order, its `node_key` and whether records reach it (tp rank 0)."""
        keys = list(dict.fromkeys(key for key, _ in said))
        self._count, self._node, self._device = len(keys), keys.index(said[rank][0]), device
        self._speaks = rank == next((n for n, (key, first) in enumerate(said) if key == said[rank][0] and first), None)
        self._cpu = _cpu_ticks() if self._speaks else None
        self._nvml = _Nvml.found() if self._speaks and device.type == "cuda" else None

    def sums(self) -> dict[str, Tensor]:
        """For `MetricWindow.add_sums`: the same name and shape on every rank."""
        values = torch.zeros(self._count, 1 + len(FIELDS), dtype=torch.float64)
        if self._speaks:
            values[self._node] = torch.tensor([1.0, *self._look()], dtype=torch.float64)
        return {KEY: values.flatten().to(self._device)}

    def _look(self) -> list[float]:
        before, self._cpu = self._cpu, _cpu_ticks()
        busy = math.nan
        if before is not None and self._cpu is not None and (passed := self._cpu[1] - before[1]) > 0:
            busy = (self._cpu[0] - before[0]) / passed
        gpus = self._nvml.look() if self._nvml is not None else [math.nan, math.nan]
        return [busy, _host_gib(), *gpus]


def nodes_record(sums: Sums) -> dict[str, float]:
    """Numbers of the nodes, by the names of METRICS."""
    if KEY not in sums:
        return {}
    by_node = sums[KEY].reshape(-1, 1 + len(FIELDS)).tolist()
    record = dict[str, float]()
    for place, (group, name) in enumerate(FIELDS, start=1):
        known = {node: row[place] for node, row in enumerate(by_node) if row[0] and math.isfinite(row[place])}
        if len(by_node) <= MOST:
            record |= {f"{group}/node{node}/{name}": value for node, value in known.items()}
        elif known:
            values = list(known.values())
            least_to_most = {"min": min(values), "mean": sum(values) / len(values), "max": max(values)}
            record |= {f"{group}/nodes/{name}_{word}": value for word, value in least_to_most.items()}
    return record


# --- counters --------------------------------------------------------------------------------------------------------

PROC = Path("/proc")


def _cpu_ticks(proc: Path | None = None) -> tuple[int, int] | None:
    """(busy, all) ticks of the machine's processors since it started; None where the kernel does not say."""
    try:
        ticks = [int(word) for word in ((proc or PROC) / "stat").read_text().split("\n", 1)[0].split()[1:9]]
        return sum(ticks) - ticks[3] - ticks[4], sum(ticks)  # idle, and idle while a disk is slow
    except (OSError, ValueError, IndexError):
        return None


def _host_gib(proc: Path | None = None) -> float:
    """Memory of the machine that nobody else could have now."""
    try:
        lines = ((proc or PROC) / "meminfo").read_text().splitlines()
        kib: Mapping[str, int] = {line.split(":")[0]: int(line.split()[1]) for line in lines if ":" in line}
        return (kib["MemTotal"] - kib["MemAvailable"]) * 1024 / GIB
    except (OSError, ValueError, IndexError, KeyError):
        return math.nan


class _Utilization(ctypes.Structure):
    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class _Nvml:
    """NVIDIA's management library, which comes with the driver; its Python package is not always there."""

    def __init__(self, library: Any) -> None:
        self._library = library
        count = ctypes.c_uint()
        self._call("nvmlInit_v2")
        self._call("nvmlDeviceGetCount_v2", ctypes.byref(count))
        self._handles = [ctypes.c_void_p() for _ in range(count.value)]
        for number, handle in enumerate(self._handles):
            self._call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(number), ctypes.byref(handle))

    @classmethod
    def found(cls) -> _Nvml | None:
        try:
            return cls(ctypes.CDLL("libnvidia-ml.so.1"))
        except (OSError, AttributeError):
            return None

    def look(self) -> list[float]:
        """Mean use (share of time, over the driver's last sample) and mean memory in GiB of the GPUs that this process may see."""
        used, memory = [], []
        for handle in self._handles:
            rates, bytes_ = _Utilization(), _Memory()
            try:
                self._call("nvmlDeviceGetMemoryInfo", handle, ctypes.byref(bytes_))
                memory.append(bytes_.used / GIB)
                self._call("nvmlDeviceGetUtilizationRates", handle, ctypes.byref(rates))
                used.append(rates.gpu / 100)
            except OSError:  # a partitioned GPU does not say its use
                continue
        return [sum(x) / len(x) if x else math.nan for x in (used, memory)]

    def _call(self, name: str, *words: Any) -> None:
        if (code := getattr(self._library, name)(*words)) != 0:
            raise OSError(code, name)

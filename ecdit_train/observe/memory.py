"""How much memory a rank uses: the device's where it has its own, and the process's."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import torch

GIB = 2**30
_STATM = Path("/proc/self/statm")


def memory_numbers(device: torch.device) -> dict[str, float]:
    """By the names of METRICS, of this rank; asks counters of the host, so nothing waits for the device."""
    numbers = {"mem/host_rss_gib": _resident() / GIB}
    if device.type == "cuda":
        stats = torch.cuda.memory_stats(device)
        numbers |= {
            "mem/allocated_gib": torch.cuda.max_memory_allocated(device) / GIB,
            "mem/reserved_gib": torch.cuda.max_memory_reserved(device) / GIB,
            "mem/retries": float(stats.get("num_alloc_retries", 0)),
        }
    return numbers


def _resident() -> int:
    """Bytes of this process in memory now; at most so far where the kernel does not say."""
    try:
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024

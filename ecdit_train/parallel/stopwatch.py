"""Time of a piece of work that is inside of others, without waiting for it."""

from __future__ import annotations

import time

import torch

MANY = 1024
"""Pairs of borders that may wait to be read before those the device has passed are folded."""


class Stopwatch:
    """Seconds inside of `with watch:`, on CUDA between two events of the current stream, else on the host's clock."""

    def __init__(self, device_type: str) -> None:
        self._cuda = device_type == "cuda"
        self._seconds = 0.0
        self._began = 0.0
        self._pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._free: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> None:
        if not self._cuda:
            self._began = time.perf_counter()
            return
        pair = self._free.pop() if self._free else (_event(), _event())
        pair[0].record()
        self._pairs.append(pair)

    def __exit__(self, *_: object) -> None:
        if not self._cuda:
            self._seconds += time.perf_counter() - self._began
            return
        self._pairs[-1][1].record()
        if len(self._pairs) > MANY:
            self._fold()

    def read(self) -> float:
        """Since the last `read`; of what the device has not passed yet the next one tells."""
        self._fold()
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _fold(self) -> None:
        done = 0
        while done < len(self._pairs) and self._pairs[done][1].query():
            first, last = self._pairs[done]
            self._seconds += first.elapsed_time(last) / 1e3
            done += 1
        self._free += self._pairs[:done]
        del self._pairs[:done]


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)

"""Where the time of a step goes, phase by phase (`supervise.beats.PHASES`).

On CUDA the borders are events on the stream, so the numbers are the device's own time: a phase that the host has left while the
device still works on it keeps its cost. They are read when everything before them is done; nothing waits for the device. On
the CPU the clock is the host's.
"""

from __future__ import annotations

import time
from collections import defaultdict

import torch

MANY = 2048
"""Borders that may wait to be read before those the device has passed are folded."""


class PhaseClock:
    """Seconds spent in each phase since the last `read`."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spent: defaultdict[str, float] = defaultdict(float)
        self._borders: list[tuple[str, torch.cuda.Event]] = []
        """Each phase that has begun on the device, oldest first."""
        self._free: list[torch.cuda.Event] = []
        self._phase: str | None = None
        self._began = 0.0

    def enter(self, phase: str) -> None:
        """A phase begins, and the one before has ended."""
        if not self._cuda:
            now = time.perf_counter()
            if self._phase is not None:
                self._spent[self._phase] += now - self._began
            self._phase, self._began = phase, now
            return
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record()
        self._borders.append((phase, event))
        if len(self._borders) > MANY:
            self._fold()

    def read(self) -> dict[str, float]:
        """Seconds by phase, and a new count; the phase that is open goes on. The device has done all that it was given."""
        if self._cuda and self._borders:
            self.enter(self._borders[-1][0])
            self._borders[-1][1].synchronize()  # an event just recorded behind work that is done
            self._fold()
        elif self._phase is not None:
            self.enter(self._phase)
        spent, self._spent = dict(self._spent), defaultdict(float)
        return spent

    def _fold(self) -> None:
        """Borders that the device has passed become seconds; asks, does not wait."""
        done = 0
        while done + 1 < len(self._borders) and self._borders[done + 1][1].query():
            phase, event = self._borders[done]
            self._spent[phase] += event.elapsed_time(self._borders[done + 1][1]) / 1e3
            self._free.append(event)
            done += 1
        del self._borders[:done]

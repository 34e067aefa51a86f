"""What the terminal shows: a live bar for a person, one plain line per log step for a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO


class Progress:
    """Progress of a run on `stream`; `stream=None` shows nothing (ranks other than 0).

    Values come from the record that is logged: train/loss, optim/lr, optim/grad_norm, perf/images_per_s, perf/step_s,
    data/stall_frac; what is missing is left out.
    """

    def __init__(self, total_steps: int, *, stream: TextIO | None = sys.stdout) -> None:
        self.total_steps = total_steps
        self._stream = stream
        self._last: tuple[int, float] | None = None
        self._step_s: float | None = None
        self._bar: Any = None
        self._task: Any = None
        if stream is not None and stream.isatty():
            self._open_bar(stream)

    def update(self, step: int, record: Mapping[str, Any]) -> None:
        """After a log step; `step` counts optimizer steps done."""
        if self._stream is None:
            return
        self._measure(step, record)
        eta = None if self._step_s is None else self._step_s * max(0, self.total_steps - step)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=describe(record, eta=eta))
        else:
            self._print(f"step {step}/{self.total_steps}  {describe(record, eta=eta)}")

    def message(self, text: str) -> None:
        """A line of its own, above the bar if there is one."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        elif self._stream is not None:
            self._print(text)

    def close(self) -> None:
        """Leaves the last state of the bar on the screen."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _measure(self, step: int, record: Mapping[str, Any]) -> None:
        """Seconds per step: wall clock between updates (it includes checkpoints and samples), smoothed."""
        now = time.monotonic()
        if self._last is None:
            self._step_s = record.get("perf/step_s")
        elif step > self._last[0]:
            seen = (now - self._last[1]) / (step - self._last[0])
            self._step_s = seen if self._step_s is None else 0.7 * self._step_s + 0.3 * seen
        self._last = (step, now)

    def _print(self, text: str) -> None:
        assert self._stream is not None
        print(text, file=self._stream, flush=True)

    def _open_bar(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[text]}"),
            console=Console(file=stream),
            redirect_stdout=False,
            redirect_stderr=False,
            refresh_per_second=4,
        )
        self._task = self._bar.add_task("train", total=self.total_steps, text="starting")
        self._bar.start()


def describe(record: Mapping[str, Any], *, eta: float | None) -> str:
    """`loss 0.1234  lr 3.0e-04  norm 0.52  812 img/s  data 1.2%  ETA 03:21`."""
    parts = []
    for key, form in (("train/loss", "loss {:.4f}"), ("optim/lr", "lr {:.1e}"), ("optim/grad_norm", "norm {:.2f}")):
        if record.get(key) is not None:
            parts.append(form.format(record[key]))
    if (rate := record.get("perf/images_per_s")) is not None:
        parts.append(f"{rate:.0f} img/s" if rate >= 100 else f"{rate:.1f} img/s")
    if (stall := record.get("data/stall_frac")) is not None:
        parts.append(f"data {100 * stall:.1f}%")
    if eta is not None:
        parts.append(f"ETA {duration(eta)}")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """03:21, 4:03:21 or 2d 04:03:21."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d {h:02d}:{m:02d}:{s:02d}"
    return f"{h}:{m:02d}:{s:02d}" if h else f"{m:02d}:{s:02d}"

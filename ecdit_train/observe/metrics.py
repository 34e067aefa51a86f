"""How the numbers of a run (`metric_table.METRICS`) gather between log steps.

Nothing waits for the device before `flush`: tensors are added up where they are, and one transfer reads them all.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from ecdit_train.supervise.beats import PHASES

from .memory import memory_numbers
from .metric_table import METRICS, Metric, metric_key, undocumented
from .phases import PhaseClock

__all__ = ["METRICS", "AllReduce", "Metric", "MetricWindow", "Reading", "Sums", "metric_key", "undocumented"]

Sums = Mapping[str, np.ndarray]
"""Sums over the steps of a window, all microbatches and all ranks, fp64: what was given to `MetricWindow.add_sums`."""

Reading = Callable[[Sums], Mapping[str, float]]
"""What makes numbers of sums: ratios, spreads and maxima are taken after everything was added up, or they would depend
on how the work was cut."""


class AllReduce(Protocol):
    """Reduces an fp64 vector over all data-parallel ranks. Called with the same names in the same order on every rank."""

    def __call__(self, vector: Tensor, *, op: Literal["max", "sum"]) -> Tensor: ...


def summed(sums: Mapping[str, Tensor], *, device: torch.device, all_reduce: AllReduce) -> dict[str, np.ndarray]:
    """Sums over all ranks, in one exchange and one transfer; waits for the device."""
    named = {name: value.to(device, torch.float64) for name, value in sorted(sums.items())}
    flat = all_reduce(torch.cat([value.flatten() for value in named.values()]), op="sum").cpu().numpy()
    return _shaped(flat, named)


def _shaped(flat: np.ndarray, like: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    parts = np.split(flat, np.cumsum([value.numel() for value in like.values()])[:-1])
    return {name: p.reshape(tuple(value.shape)) for p, (name, value) in zip(parts, like.items(), strict=True)}


OWN = ("data/loader/", "samples/")
"""Names of what belongs to this process, not to the run: not in its checkpoints."""
SUMS = "sums:"
"""Before the names of sums in a saved window."""
ALONE = ("data", "encode")
"""Phases in which no rank waits for another, so that the slowest one's time is its own."""


class MetricWindow:
    """Metrics between two log steps.

    `images_per_step` and `tokens_per_step` count one optimizer step over all ranks; `flops_per_step` are the model's
    FLOP of such a step and `peak_flops` the FLOP/s of all devices together (None: no MFU, as on CPU); `planned_mfu` is
    what `ecdit plan` foresees.

        with window.waiting():
            raw = batches.fetch()
        ...
        window.add("train/loss", loss)          # a device scalar or a float
        window.step_done()
        with window.paused():
            save()
        record = window.flush(all_reduce)       # the one synchronisation
    """

    def __init__(
        self,
        *,
        device: torch.device | str,
        images_per_step: int,
        tokens_per_step: int,
        flops_per_step: float | None = None,
        peak_flops: float | None = None,
        planned_mfu: float | None = None,
    ) -> None:
        self._device = torch.device(device)
        self._images_per_step = images_per_step
        self._tokens_per_step = tokens_per_step
        self.flops_per_step = flops_per_step
        """May be set anew while the run goes on."""
        self._peak_flops = peak_flops
        self._planned_mfu = planned_mfu
        self._clock = PhaseClock(self._device)
        self.enter = self._clock.enter
        """Told each phase as it begins, the same ones on all ranks."""
        self.inside: Callable[[], Mapping[str, float]] = dict
        """More seconds by name since it was asked last, of what happens inside of phases; asked once the device is done."""
        self._reset()

    def _reset(self) -> None:
        self._values: dict[str, Tensor | float] = {}
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._inside: Counter[str] = Counter()
        self._steps = 0
        self._waited = 0.0
        self._paused = 0.0
        self._start = time.perf_counter()

    def add(self, name: str, value: Tensor | float) -> None:
        """One value of this step, reduced over the window as METRICS says; a name that METRICS lacks is our mistake."""
        metric = METRICS.get(metric_key(name))
        assert metric is not None, f"metric {name} is not in observe.metrics.METRICS"
        if isinstance(value, Tensor):
            value = value.detach().to(torch.float64)
        if name not in self._values or metric.reduction == "last":
            self._values[name], self._counts[name] = value, 1
            return
        before = self._values[name]
        if metric.reduction != "max":
            self._values[name] = before + value
        elif isinstance(before, Tensor) or isinstance(value, Tensor):
            self._values[name] = torch.maximum(self._tensor(before), self._tensor(value))
        else:
            self._values[name] = max(before, value)
        self._counts[name] += 1

    def add_all(self, values: Mapping[str, Tensor | float]) -> None:
        for name, value in values.items():
            self.add(name, value)

    def add_sums(self, sums: Mapping[str, Tensor]) -> None:
        """Tensors of any shape, added up over steps, microbatches and ranks in fp64: counts stay whole, and fp32 numbers of
        ordinary size add up to the same bits in any order. `flush` hands them to its `reading`."""
        for name, value in sums.items():
            value = value.detach().to(torch.float64)
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def state_dict(self, all_reduce: AllReduce | None = None) -> dict[str, list[float]]:
        """What has gathered since the last record, as JSON: a run stopped between two log steps then logs the same means as
        one that was not. Times and OWN stay out. Collective: sums are each rank's own."""
        kept = {name: value for name, value in self._values.items() if not name.startswith(OWN)}
        values = {name: value for name, value in kept.items() if not isinstance(value, Tensor)}
        assert len(values) == len(kept), "a device value is one rank's own, a checkpoint is everybody's"
        names = sorted(name for name in values if METRICS[metric_key(name)].reduction == "sum")
        sums = dict(sorted(self._sums.items()))
        assert all(value.dim() == 1 for value in sums.values()), "a record comes before a checkpoint of the same step"
        parts = [self._tensor([values[name] for name in names]), *sums.values()]
        total = torch.cat(parts)
        if all_reduce is not None and len(total):
            total = all_reduce(total, op="sum")
        own, *vectors = total.split([len(part) for part in parts])
        values |= dict(zip(names, own.tolist(), strict=True))
        state = {name: [value, self._counts[name]] for name, value in values.items()}
        return state | {f"{SUMS}{name}": vector.tolist() for name, vector in zip(sums, vectors, strict=True)}

    def load_state_dict(self, state: Mapping[str, list[float]], *, first: bool = True) -> None:
        """Replaces what has gathered, times too (but those of phases: they are the process's). `first`: on the rank
        that takes over the sums of all; the others begin at 0."""
        self._reset()
        for name, kept in state.items():
            if name.startswith(SUMS):
                vector = self._tensor(kept)
                self._sums[name.removeprefix(SUMS)] = vector if first else torch.zeros_like(vector)
                continue
            value, count = kept
            own = first or METRICS[metric_key(name)].reduction != "sum"
            self._values[name], self._counts[name] = value if own else 0.0, int(count)

    def begin(self) -> None:
        """Steps begin now: what was built before them is no part of their time."""
        self._waited = self._paused = 0.0
        self._start = time.perf_counter()

    def step_done(self) -> None:
        """An optimizer step was taken."""
        self._steps += 1

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time inside counts as waiting for data."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._waited += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside is not training: left out of throughput, step time and stall share."""
        self._synchronize()
        start = time.perf_counter()
        self._inside.update(self.inside())
        try:
            yield
        finally:
            self._synchronize()
            self.inside()  # nor is what was done in it
            self._paused += time.perf_counter() - start

    def flush(self, all_reduce: AllReduce | None = None, *, reading: Reading = lambda sums: {}) -> dict[str, float]:
        """The record of this window, and a new window. The only synchronisation with the device. `reading`: what the sums that
        gathered say; the same on all ranks."""
        self.add_all(memory_numbers(self._device))
        self._synchronize()  # the device has done these steps: its clocks can be read
        self._inside.update(self.inside())
        if self._steps:
            self._add_phases({**self._clock.read(), **self._inside})
        self.add("data/stall_frac", self._waited / max(time.perf_counter() - self._start - self._paused, 1e-9))
        record, sums = self._reduced(all_reduce)
        elapsed = time.perf_counter() - self._start - self._paused  # what ranks wait for each other is in it
        if "data/loader/samples" in record:
            record["data/loader/samples_per_s"] = record["data/loader/samples"] / elapsed
        if self._steps:
            step_s = elapsed / self._steps
            record["perf/step_s"] = step_s
            record["perf/images_per_s"] = self._images_per_step / step_s
            record["perf/tokens_per_s"] = self._tokens_per_step / step_s
            if self.flops_per_step is not None and self._peak_flops is not None:
                record["perf/mfu"] = mfu = self.flops_per_step / step_s / self._peak_flops
                if self._planned_mfu:
                    record["perf/mfu_of_plan"] = mfu / self._planned_mfu
        self._reset()
        never = {
            name for name, value in record.items() if value == 0 and name.startswith(("perf/time/", "perf/slowest/"))
        }
        return {name: value for name, value in record.items() if name not in never} | dict(reading(sums))

    def _add_phases(self, seconds: Mapping[str, float]) -> None:
        """All phases that there are, as ranks must reduce the same names whatever each of them has been through."""
        for phase in sorted({*PHASES, "expert_exchange", *seconds}):
            spent = seconds.get(phase, 0.0) / self._steps
            self.add(f"perf/time/{phase}", spent)
            if phase in ALONE:
                self.add(f"perf/slowest/{phase}", spent)

    def _reduced(self, all_reduce: AllReduce | None) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """The values by name and the sums, over ranks: one exchange of sums, one of maxima, one transfer of both."""
        known: dict[str, float] = {}
        names: dict[str, list[str]] = {"mean": [], "sum": [], "max": []}
        for name in sorted(self._values):
            reduction, value = METRICS[metric_key(name)].reduction, self._values[name]
            if reduction == "last" and not isinstance(value, Tensor):
                known[name] = float(value)
                continue
            names["mean" if reduction == "last" else reduction].append(name)
        of = {kind: self._vector([self._window_value(name) for name in group]) for kind, group in names.items()}
        sums = dict(sorted(self._sums.items()))
        added = torch.cat([self._tensor([1.0]), of["mean"], of["sum"], *(value.flatten() for value in sums.values())])
        largest = of["max"]
        if all_reduce is not None:
            added = all_reduce(added, op="sum")
            largest = all_reduce(largest, op="max") if len(largest) else largest
        flat = torch.cat([added, largest]).cpu().numpy()
        ranks, rest = flat[0], flat[1:]
        cut = np.cumsum([len(names["mean"]), len(names["sum"]), sum(value.numel() for value in sums.values())])
        means, totals, vectors, largest_now = np.split(rest, cut)
        for group, numbers in ((names["mean"], means / ranks), (names["sum"], totals), (names["max"], largest_now)):
            known |= dict(zip(group, numbers.tolist(), strict=True))
        return known, _shaped(vectors, sums) if sums else {}

    def _window_value(self, name: str) -> Tensor | float:
        mean = METRICS[metric_key(name)].reduction == "mean"
        return self._values[name] / self._counts[name] if mean else self._values[name]

    def _vector(self, values: list[Tensor | float]) -> Tensor:
        """Floats travel to the device together: each alone would be a copy of its own."""
        if not any(isinstance(value, Tensor) for value in values):
            return self._tensor(values)
        return torch.stack([self._tensor(value) for value in values])

    def _tensor(self, value: Tensor | float | list) -> Tensor:
        return torch.as_tensor(value, dtype=torch.float64, device=self._device)

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

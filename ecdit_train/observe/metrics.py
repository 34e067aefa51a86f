"""Numbers of a run: what each is called and means (`METRICS`), how they gather between log steps (`MetricWindow`).

Nothing waits for the device before `flush`: tensors are added up where they are, and one transfer reads them all.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

Reduction = Literal["mean", "max", "sum", "last"]
"""Over the steps of a window, and then over ranks. `last`: the newest step; a tensor is averaged over ranks, a float is
kept (it is equal on all ranks, and fp32 would round a count of images)."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    unit: str
    reduction: Reduction
    question: str
    """What a reader learns from it."""

    def __str__(self) -> str:
        return f"{self.question} [{self.unit}; {self.reduction}]"


def _metric(unit: str, reduction: Reduction, question: str) -> Metric:
    return Metric(unit=unit, reduction=reduction, question=question)


METRICS: dict[str, Metric] = {
    # train/
    "train/loss": _metric(
        "latent units^2", "mean", "Is it learning? Mean squared error of the prediction at kept patches."
    ),
    "train/balance_loss": _metric("1", "mean", "Token choice only: how uneven are the experts, weight included?"),
    "train/{name}_loss": _metric("1", "mean", "An auxiliary loss of a router (`Assignment.losses`), weight included."),
    "train/images": _metric("images", "last", "How many images has the run seen?"),
    # optim/
    "optim/lr": _metric("1", "last", "Which learning rate is in force?"),
    "optim/grad_norm": _metric(
        "1", "mean", "How large is the global gradient before clipping? Spikes come before trouble."
    ),
    "optim/grad_norm_max": _metric("1", "max", "Was there a spike between two log steps?"),
    "optim/clipped_frac": _metric(
        "share of steps", "mean", "How often did clipping act? Near 1: the limit sets the step."
    ),
    # moe/: one microbatch of the log step; L{n}: the sparse block's number counted from 1; without: over layers.
    "moe/dropped_frac": _metric("share of tokens", "mean", "How many tokens does no expert of a layer take?"),
    "moe/dropped_everywhere_frac": _metric(
        "share of tokens", "mean", "How many tokens does no expert of any layer take?"
    ),
    "moe/experts_per_token_std": _metric(
        "experts", "mean", "How unevenly is compute spread? (the mean is f_c by construction)"
    ),
    "moe/experts_per_token_max": _metric("experts", "max", "What is the largest compute that one token gets?"),
    "moe/entropy": _metric(
        "share of log E", "mean", "How undecided is the router? 1: uniform over experts, 0: certain."
    ),
    "moe/gate_mean": _metric(
        "1", "mean", "With what weight do experts enter? Near 1/E: the router has not specialised."
    ),
    "moe/overflow_frac": _metric(
        "share of choices", "mean", "Token choice only: how many choices found their expert full?"
    ),
    "moe/load_cv": _metric("std / mean", "mean", "Token choice only: how unequal is the load of experts? 0: equal."),
    "moe/max_violation": _metric(
        "share of mean load",
        "mean",
        "By how much is the busiest expert of a rank's last microbatch over its mean load (MaxVio)? 0: loads are equal.",
    ),
    "moe/combination_usage": _metric(
        "share of pairs",
        "mean",
        "How many pairs of experts cover 95 % of all that work on one token, in a rank's last microbatch? Near 0: collapse.",
    ),
    "moe/L{n}/max_violation": _metric("share of mean load", "mean", "Overload of layer n's busiest expert."),
    "moe/L{n}/combination_usage": _metric(
        "share of pairs", "mean", "Pairs of layer n that cover 95 % of co-activations."
    ),
    "moe/L{n}/dropped_frac": _metric("share of tokens", "mean", "Tokens that no expert of layer n takes."),
    "moe/L{n}/experts_per_token_std": _metric("experts", "mean", "Spread of compute over tokens in layer n."),
    "moe/L{n}/experts_per_token_max": _metric("experts", "max", "Largest compute of one token in layer n."),
    "moe/L{n}/entropy": _metric(
        "share of log E", "mean", "Indecision of layer n's router; a collapse to 0 is a dead router."
    ),
    "moe/L{n}/gate_mean": _metric("1", "mean", "Mean weight of the filled slots of layer n."),
    "moe/L{n}/overflow_frac": _metric(
        "share of choices", "mean", "Token choice only: choices of layer n beyond capacity."
    ),
    "moe/L{n}/load_cv": _metric("std / mean", "mean", "Token choice only: unequal load of experts in layer n."),
    "moe/L{n}/capped_frac": _metric(
        "share of rows", "mean", "Routers of varying load under a static cap only: rows of layer n beyond it."
    ),
    "moe/capped_frac": _metric(
        "share of rows", "mean", "Routers of varying load under a static cap only: how many rows are dropped?"
    ),
    "moe/predictor_accuracy": _metric(
        "share of choices", "mean", "DiffMoE only: how much of the selection does its predictor foresee?"
    ),
    "moe/predicted_experts_per_token": _metric(
        "experts",
        "mean",
        "DiffMoE only: what would drawing take of these tokens? The budget is moe.router.capacity_factor.",
    ),
    "moe/{name}": _metric(
        "the router's", "mean", "What a router reports of itself (`Assignment.metrics`), over layers."
    ),
    "moe/{name}_max": _metric("the router's", "max", "The same, where the name ends in _max."),
    "moe/L{n}/{name}": _metric("the router's", "mean", "What the router of layer n reports of itself."),
    "moe/L{n}/{name}_max": _metric("the router's", "max", "The same, where the name ends in _max."),
    # perf/: wall time of the window without pauses (checkpoints, samples).
    "perf/images_per_s": _metric("images/s, all ranks", "mean", "How fast is it?"),
    "perf/tokens_per_s": _metric("tokens/s, all ranks", "mean", "How fast is it, whatever resolution and mask ratio?"),
    "perf/step_s": _metric("s", "mean", "How long does an optimizer step take?"),
    "perf/mfu": _metric(
        "share of peak", "mean", "How much of the GPUs' peak does model arithmetic use? Absent on CPU."
    ),
    "perf/memory_gib": _metric("GiB, fullest rank", "max", "How close to the end of device memory? Absent on CPU."),
    # data/
    "data/stall_frac": _metric(
        "share of time", "mean", "How long do ranks wait for the loader? Above a few percent, feed more."
    ),
    "data/substituted": _metric("samples", "sum", "How many unreadable samples were replaced since the last log step?"),
    "data/skipped": _metric(
        "samples",
        "sum",
        "How many samples without a caption were replaced since the last log step (`data.no_caption=skip`)?",
    ),
    "data/uncaptioned": _metric(
        "samples", "sum", "How many were trained on without text since then, as they have no caption (`unconditional`)?"
    ),
    "data/passed_over": _metric(
        "samples", "sum", "How many samples stand in for ones that were taken down (`data.take_down`) since then?"
    ),
    "data/bad/{kind}": _metric(
        "samples",
        "sum",
        "The substituted samples by kind of error; together they are `data/substituted`. Absent when 0.",
    ),
    "data/epochs": _metric(
        "passes", "last", "How often has the run been through its data? Absent where nobody can say."
    ),
    "data/source/{name}/epochs": _metric("passes", "last", "Mixtures only: the same for each source."),
    "data/left_out": _metric(
        "samples",
        "last",
        "How many samples does an epoch leave out, as they fill no global batch? Others in each epoch.",
    ),
    # loader/: this process's own, over all ranks; prefetched samples included, so they are not repeated by a resume.
    "loader/samples_per_s": _metric(
        "samples/s, all ranks", "sum", "How many samples did training take, pauses left out?"
    ),
    "loader/samples": _metric("samples", "sum", "How many samples were delivered since the last log step?"),
    "loader/bytes_read": _metric("bytes", "sum", "How many bytes of samples were read since then?"),
    "loader/bytes_fetched": _metric(
        "bytes",
        "sum",
        "How many came from an object store? Far above `loader/bytes_read`: ranges hold what nobody wants.",
    ),
    "loader/read_retries": _metric(
        "reads", "sum", "How many reads had to be repeated? A disk or a store is in trouble."
    ),
    "loader/hedged": _metric("ranges", "sum", "How many ranges were asked for twice, as the first answer was slow?"),
    "loader/decoder_fallbacks": _metric("calls", "sum", "How often did the reference take over from DALI?"),
    "loader/steps_ready": _metric(
        "steps", "mean", "How many steps lie ready when training asks for one? At `data.prefetch` loading is faster."
    ),
    "loader/steps_late_max": _metric(
        "steps",
        "max",
        "How many of the prefetched steps were missing at worst, on any rank? All of them: somebody waited.",
    ),
    # reliability/: only in runs where it happened.
    "reliability/skipped": _metric(
        "updates", "last", "How many updates were left out? Their samples are in the log and in the checkpoints."
    ),
    "reliability/roll_backs": _metric("times", "last", "How often did the run go back to a checkpoint by itself?"),
    # validation/: at fixed draws on the held-out images (`validation.images`).
    "validation/loss": _metric("latent units^2", "last", "Does it learn more than its training images?"),
    "validation/loss_ema": _metric(
        "latent units^2", "last", "The same with the averaged weights, with which it draws."
    ),
    "validation/substituted": _metric(
        "samples",
        "last",
        "How many held-out images could not be read? Others stood in; above 0 the loss is not comparable.",
    ),
    # ckpt/: in the records after a save; this life's own.
    "ckpt/step": _metric("step", "last", "Up to where can nothing be lost? The newest committed step."),
    "ckpt/blocked_s": _metric("s", "last", "How long did training wait for the newest save?"),
    "ckpt/save_s": _metric("s", "last", "How long did it take from the request to the commit?"),
    "ckpt/interval": _metric(
        "steps", "last", "How far apart are saves? Only with `checkpoint.every_steps: null`, which derives it."
    ),
    "ckpt/failed": _metric("saves", "last", "How many saves in a row has the disk refused?"),
}
"""Every name that a training run logs. `{n}` stands for a layer number."""


def metric_key(name: str) -> str:
    """The key of METRICS that describes a logged name: `moe/L2/entropy` -> `moe/L{n}/entropy`; what a router of one's own
    reports falls under the entries with `{name}`."""
    key = re.sub(r"/L\d+/", "/L{n}/", name)
    key = re.sub(r"^data/bad/\w+$", "data/bad/{kind}", key)
    key = re.sub(r"^data/source/[\w-]+/", "data/source/{name}/", key)
    if key in METRICS:
        return key
    room, _, rest = key.rpartition("/")
    end = next((end for end in ("_max", "_loss") if rest.endswith(end)), "")
    own = f"{room}/{{name}}{end}"
    return own if own in METRICS else key


def undocumented(record: Mapping[str, object]) -> set[str]:
    """Names of a record that METRICS does not describe."""
    return {name for name in record if metric_key(name) not in METRICS}


class AllReduce(Protocol):
    """Reduces an fp32 vector over all ranks. Called with the same names in the same order on every rank."""

    def __call__(self, vector: Tensor, *, op: Literal["mean", "max", "sum"]) -> Tensor: ...


class MetricWindow:
    """Metrics between two log steps.

    `images_per_step` and `tokens_per_step` count one optimizer step over all ranks; `flops_per_step` are the model's
    FLOP of such a step and `peak_flops` the FLOP/s of all devices together (None: no MFU, as on CPU).

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
    ) -> None:
        self._device = torch.device(device)
        self._images_per_step = images_per_step
        self._tokens_per_step = tokens_per_step
        self.flops_per_step = flops_per_step
        """May be set anew while the run goes on."""
        self._peak_flops = peak_flops
        self._reset()

    def _reset(self) -> None:
        self._values: dict[str, Tensor | float] = {}
        self._counts: dict[str, int] = {}
        self._steps = 0
        self._waited = 0.0
        self._paused = 0.0
        self._start = time.perf_counter()

    def add(self, name: str, value: Tensor | float) -> None:
        """One value of this step, reduced over the window as METRICS says; a name that METRICS lacks is our mistake."""
        metric = METRICS.get(metric_key(name))
        assert metric is not None, f"metric {name} is not in observe.metrics.METRICS"
        if isinstance(value, Tensor):
            value = value.detach().float()
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

    def state_dict(self, all_reduce: AllReduce | None = None) -> dict[str, list[float]]:
        """What has gathered since the last record, as JSON: a run stopped between two log steps then logs the same
        means as one that was not. Times and loader/ belong to the process and stay out. Collective: sums are each rank's own."""
        kept = {name: value for name, value in self._values.items() if not name.startswith("loader/")}
        values = {name: value for name, value in kept.items() if not isinstance(value, Tensor)}
        assert len(values) == len(kept), "a device value is one rank's own, a checkpoint is everybody's"
        sums = sorted(name for name in values if METRICS[metric_key(name)].reduction == "sum")
        if sums and all_reduce is not None:
            total = all_reduce(torch.stack([self._tensor(values[name]) for name in sums]), op="sum")
            values |= dict(zip(sums, total.tolist(), strict=True))
        return {name: [value, self._counts[name]] for name, value in values.items()}

    def load_state_dict(self, state: Mapping[str, list[float]], *, first: bool = True) -> None:
        """Replaces what has gathered, times too. `first`: on the rank that takes over the sums of all; the others begin at 0."""
        self._reset()
        own = {name: first or METRICS[metric_key(name)].reduction != "sum" for name in state}
        self._values = {name: value if own[name] else 0.0 for name, (value, _) in state.items()}
        self._counts = {name: int(count) for name, (_, count) in state.items()}

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
        try:
            yield
        finally:
            self._synchronize()
            self._paused += time.perf_counter() - start

    def flush(self, all_reduce: AllReduce | None = None) -> dict[str, float]:
        """The record of this window, and a new window. The only synchronisation with the device."""
        if self._device.type == "cuda":
            self.add("perf/memory_gib", torch.cuda.max_memory_allocated(self._device) / 2**30)
        self.add("data/stall_frac", self._waited / max(time.perf_counter() - self._start - self._paused, 1e-9))
        record = self._reduced(all_reduce)
        elapsed = time.perf_counter() - self._start - self._paused  # after the sync: the device has done these steps
        if "loader/samples" in record:
            record["loader/samples_per_s"] = record["loader/samples"] / elapsed
        if self._steps:
            step_s = elapsed / self._steps
            record["perf/step_s"] = step_s
            record["perf/images_per_s"] = self._images_per_step / step_s
            record["perf/tokens_per_s"] = self._tokens_per_step / step_s
            if self.flops_per_step is not None and self._peak_flops is not None:
                record["perf/mfu"] = self.flops_per_step / step_s / self._peak_flops
        self._reset()
        return record

    def _reduced(self, all_reduce: AllReduce | None) -> dict[str, float]:
        names: dict[Literal["mean", "max", "sum"], list[str]] = {"mean": [], "max": [], "sum": []}
        known: dict[str, float] = {}
        for name in sorted(self._values):
            reduction, value = METRICS[metric_key(name)].reduction, self._values[name]
            if reduction == "last" and not isinstance(value, Tensor):
                known[name] = float(value)
                continue
            names["mean" if reduction == "last" else reduction].append(name)
        vectors = []
        for op, group in names.items():
            if not group:
                continue
            vector = torch.stack([self._tensor(self._window_value(name)) for name in group])
            vectors.append(vector if all_reduce is None else all_reduce(vector, op=op))
        flat = torch.cat(vectors).tolist()
        return known | dict(zip([name for group in names.values() for name in group], flat, strict=True))

    def _window_value(self, name: str) -> Tensor | float:
        mean = METRICS[metric_key(name)].reduction == "mean"
        return self._values[name] / self._counts[name] if mean else self._values[name]

    def _tensor(self, value: Tensor | float) -> Tensor:
        return torch.as_tensor(value, dtype=torch.float32, device=self._device)

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

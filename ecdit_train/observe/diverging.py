"""Where the logs of two runs part: the first step at which a metric that both have differs. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Records = Sequence[Mapping[str, Any]]

MACHINES = ("time", "perf/", "mem/", "ckpt/", "data/loader/", "reliability/", "data/stall_frac")
"""Of a record: what measures a machine or a life, not the run."""
FIRST = "train/loss"


@dataclass(frozen=True, kw_only=True)
class Apart:
    """A step at which two runs differ."""

    step: int
    metric: str
    one: float | None
    other: float | None
    """None: not finite."""
    also: tuple[str, ...]
    """Other metrics that differ at this step."""


@dataclass(frozen=True, kw_only=True)
class Parting:
    """Two runs side by side."""

    steps: int
    """Steps that both have logged."""
    last: int | None
    """The last of them."""
    apart: Apart | None
    """The first step at which any metric differs."""
    loss: Apart | None
    """The first at which `train/loss` does, where that is a later one."""

    def text(self) -> str:
        if not self.steps:
            return "no step that both have logged"
        if self.apart is None:
            return f"no difference in {self.steps} steps that both have logged, up to step {self.last}"
        at = self.apart
        also = f", and {len(at.also)} more metrics" if at.also else ""
        told = f"first apart at step {at.step}: {at.metric} {_said(at.one)} and {_said(at.other)}{also}"
        later = f"; train/loss from step {self.loss.step}" if self.loss is not None else ""
        return f"{told}{later} ({self.steps} steps in common)"


def parting(one: Records, other: Records, *, tolerance: float = 0.0) -> Parting:
    """`tolerance`: relative to the larger of both values; 0 compares bit for bit."""
    by_step = {r["step"]: r for r in other if "step" in r}
    pairs = [(r, by_step[r["step"]]) for r in one if r.get("step") in by_step]
    found: Apart | None = None
    for a, b in pairs:
        metrics = [k for k in a if k in b and k != "step" and not k.startswith(MACHINES)]
        differ = [k for k in metrics if not _alike(a[k], b[k], tolerance)]
        if found is None and differ:
            name = FIRST if FIRST in differ else differ[0]
            also = tuple(k for k in differ if k != name)
            found = Apart(step=a["step"], metric=name, one=_number(a[name]), other=_number(b[name]), also=also)
        if found is not None and (found.metric == FIRST or FIRST in differ):
            later = None
            if found.metric != FIRST:
                later = Apart(step=a["step"], metric=FIRST, one=_number(a[FIRST]), other=_number(b[FIRST]), also=())
            return Parting(steps=len(pairs), last=pairs[-1][0]["step"], apart=found, loss=later)
    return Parting(steps=len(pairs), last=pairs[-1][0]["step"] if pairs else None, apart=found, loss=None)


def metrics_of(records: Records) -> set[str]:
    return {k for r in records for k in r if k not in ("step", "time")}


def _alike(a: Any, b: Any, tolerance: float) -> bool:
    x, y = _number(a), _number(b)
    if x is None or y is None:
        return x is y and (a is None) == (b is None) and (a is None or isinstance(a, int | float) or a == b)
    return x == y or abs(x - y) <= tolerance * max(abs(x), abs(y))


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _said(value: float | None) -> str:
    return "not finite" if value is None else repr(value)

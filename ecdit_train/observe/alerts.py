"""What deserves somebody's attention, each with a page that says what to do: the table, and what finds it in a run's records. Pure.

An alert is told once when it begins and once when it is over; between the two it is on. Each rule wants to see its trouble in
several records in a row, and more than its absence before it is over, so that a value at the limit does not flood anybody.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Level = Literal["warning", "error"]
PAGES = "docs/runbook"


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of alert."""

    level: Level
    page: str
    """In docs/runbook."""
    meaning: str


KINDS: Mapping[str, Kind] = {
    "non-finite": Kind(
        level="error",
        page="non-finite-loss.md",
        meaning="the loss or its gradient is not finite: an update was left out, or the run ends",
    ),
    "loss-spike": Kind(level="warning", page="loss-spike.md", meaning="a loss is far above the last ones"),
    "slow-data": Kind(level="warning", page="slow-data.md", meaning="ranks wait for data"),
    "slow-steps": Kind(level="warning", page="slow-steps.md", meaning="steps take longer than this life's usual ones"),
    "bad-samples": Kind(
        level="warning", page="bad-shards.md", meaning="samples cannot be read, and others stand in for them"
    ),
    "dead-experts": Kind(
        level="warning",
        page="dead-experts.md",
        meaning="experts of a layer add next to nothing, or its router is decided for good",
    ),
    "save-refused": Kind(
        level="error", page="storage.md", meaning="the disk refuses checkpoints: what is trained may be lost"
    ),
    "disk-nearly-full": Kind(
        level="warning", page="disk-nearly-full.md", meaning="the run folder's disk will not hold many more checkpoints"
    ),
    "many-restarts": Kind(level="warning", page="many-restarts.md", meaning="the run begins again and again"),
    "no-progress": Kind(
        level="error", page="no-progress.md", meaning="the job has given up: no life commits a newer step"
    ),
}
"""By name. Each has a page, and each page of an alert says its name."""


@dataclass(frozen=True, kw_only=True)
class Alert:
    """One that begins, or is over."""

    name: str
    step: int
    words: str
    over: bool = False

    @property
    def level(self) -> str:
        """W&B's and the console's: info, warning or error."""
        return "info" if self.over else KINDS[self.name].level

    def __str__(self) -> str:
        if self.over:
            return f"{self.name} is over at step {self.step}: {self.words}"
        return f"{self.name} at step {self.step}: {self.words} ({PAGES}/{KINDS[self.name].page})"


STALL, STALL_OVER = 0.25, 0.10
"""Share of time that ranks wait for data: a quarter of the machine's time is worth a look; below a tenth it is the usual noise."""
SLOWER, SLOWER_OVER = 1.5, 1.2
"""Seconds of a step over the median of the last `USUAL` records."""
USUAL = 32
ENTROPY, ENTROPY_OVER = 0.01, 0.02
"""Of log E: a router below has decided for good, as nothing comes back through a softmax that is that certain."""
FREE_SAVES, FREE_SAVES_OVER = 2.0, 3.0
"""Checkpoints that the disk still holds. A new one is written before the oldest goes."""
RESTARTS, RESTART_SECONDS = 5, 3600.0
"""Lives within an hour; a healthy run begins a few times a day."""
PATIENCE, CALM = 3, 6
"""Records in a row that show a trouble before it is told, and its absence before it is over."""

State = tuple[bool, bool, str]
"""Whether it is in trouble, whether it is calm, and what was seen. Neither: between two limits."""


class Watch:
    """Looks at each record of a life, on rank 0."""

    def __init__(self) -> None:
        self._seen: dict[str, int] = {}
        """Records in a row: above 0 in trouble, below 0 calm while it is on."""
        self._on: set[str] = set()
        self._step_s: deque[float] = deque(maxlen=USUAL)
        self._slow_in_a_row = 0

    def see(self, step: int, record: Mapping[str, Any], *, free_saves: float | None = None) -> list[Alert]:
        """What begins or is over with this record.

        Args:
            free_saves: checkpoints of the newest one's size that the disk still holds, where anybody knows.
        """
        found = []
        for name, rule in _RULES.items():
            if (state := rule(record)) is not None:
                found += self._judge(name, step, state, patience=1 if name in _AT_ONCE else PATIENCE)
        if (state := self._slow(record)) is not None:
            found += self._judge("slow-steps", step, state, patience=PATIENCE)
        if free_saves is not None:
            state = (
                free_saves < FREE_SAVES,
                free_saves > FREE_SAVES_OVER,
                f"room for {free_saves:.1f} more checkpoints",
            )
            found += self._judge("disk-nearly-full", step, state, patience=1)
        for name in _EVENTS & self._on:  # no such event since the last record
            found += self._judge(name, step, (False, True, "none since"), patience=1)
        return found

    def event(self, name: str, step: int, words: str) -> list[Alert]:
        """Something that happened, as the guard says it: told, unless it is on already."""
        return self._judge(name, step, (True, False, words), patience=1)

    def begins(self, began: list[float], *, now: float, step: int) -> list[Alert]:
        """A life begins; `began`: when each life of the run did, in seconds since the epoch."""
        recent = sum(now - RESTART_SECONDS <= at <= now for at in began)
        if recent < RESTARTS:
            return []
        return self.event("many-restarts", step, f"{recent} lives began within an hour")

    def _slow(self, record: Mapping[str, Any]) -> State | None:
        step_s = record.get("perf/step_s")
        if not isinstance(step_s, int | float) or not math.isfinite(step_s):
            return None
        usual = statistics.median(self._step_s) if len(self._step_s) >= USUAL // 2 else None
        slow = usual is not None and step_s >= SLOWER * usual
        self._slow_in_a_row = self._slow_in_a_row + 1 if slow else 0
        if not slow or self._slow_in_a_row > 2 * USUAL:  # slow ones are not what is usual, unless they have come to be
            self._step_s.append(step_s)
        if usual is None:
            return None
        words = f"{step_s:.3g} s a step, usually {usual:.3g} s"
        return step_s >= SLOWER * usual, step_s < SLOWER_OVER * usual, words

    def _judge(self, name: str, step: int, state: State, *, patience: int) -> list[Alert]:
        trouble, calm, words = state
        on, count = name in self._on, self._seen.get(name, 0)
        if trouble:
            count = max(count, 0) + 1
        elif calm:
            count = min(count, 0) - 1
        else:
            count = 0
        self._seen[name] = count
        if not on and count >= patience:
            self._on.add(name)
            return [Alert(name=name, step=step, words=words)]
        if on and count <= -CALM:
            self._on.discard(name)
            return [Alert(name=name, step=step, words=words, over=True)]
        return []


def _number(record: Mapping[str, Any], name: str) -> float | None:
    value = record.get(name)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _slow_data(record: Mapping[str, Any]) -> State | None:
    if (share := _number(record, "data/stall_frac")) is None:
        return None
    return share >= STALL, share < STALL_OVER, f"ranks wait for data {share:.0%} of the time"


def _bad_samples(record: Mapping[str, Any]) -> State | None:
    if (count := _number(record, "data/substituted")) is None:
        return None
    return count > 0, count == 0, f"{count:.0f} samples since the last record could not be read"


def _save_refused(record: Mapping[str, Any]) -> State | None:
    if (count := _number(record, "ckpt/failed")) is None:
        return None
    return count > 0, count == 0, f"{count:.0f} saves in a row were refused"


def _dead_experts(record: Mapping[str, Any]) -> State | None:
    """Experts whose gates add up to next to nothing, where a metric counts them; a certain router where entropies are known."""
    counted = {name: _number(record, name) for name in record if re.fullmatch(r"moe/L\d+/dead_experts", name)}
    entropy = {name: _number(record, name) for name in record if re.fullmatch(r"moe/L\d+/entropy", name)}
    if not counted and not entropy:
        return None
    dead = [
        f"{name.split('/')[1]} has {n:g} experts whose gates add up to less than a tenth of the mean"
        for name, n in counted.items()
        if n
    ]
    sure = [
        f"{name.split('/')[1]}'s router is certain (entropy {x:.3g} of log E)"
        for name, x in entropy.items()
        if x is not None and x < ENTROPY
    ]
    calm = not dead and all(x is None or x > ENTROPY_OVER for x in entropy.values())
    return bool(dead or sure), calm, "; ".join([*dead, *sure][:4]) or "each expert works"


_RULES: Mapping[str, Callable[[Mapping[str, Any]], State | None]] = {
    "slow-data": _slow_data,
    "bad-samples": _bad_samples,
    "save-refused": _save_refused,
    "dead-experts": _dead_experts,
}
_AT_ONCE = {"bad-samples", "save-refused"}
_EVENTS = {"non-finite", "loss-spike", "many-restarts"}

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

from ecdit_train.config.life import AlertsConfig

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


STALL_OVER = 0.4
"""Of `stall_frac`: a quarter of the machine's time is worth a look; below a tenth it is the usual noise."""
SLOWER_OVER = 0.4
"""Of what `slow_steps` is above 1."""
USUAL = 32
"""Records whose median is usual."""
ENTROPY_OVER = 2.0
"""Times `router_entropy`, below which nothing comes back through a softmax."""
FREE_OVER = 1.5
"""Times `free_checkpoints`. A new one is written before the oldest goes."""
RESTART_SECONDS = 3600.0
PATIENCE, CALM = 3, 6
"""Records in a row that show a trouble before it is told, and its absence before it is over."""

State = tuple[bool, bool, str]
"""Whether it is in trouble, whether it is calm, and what was seen. Neither: between two limits."""


class Watch:
    """Looks at each record of a life, on rank 0."""

    def __init__(self, limits: AlertsConfig) -> None:
        self._limits = limits
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
            if (state := rule(record, self._limits)) is not None:
                found += self._judge(name, step, state, patience=1 if name in _AT_ONCE else PATIENCE)
        if (state := self._slow(record)) is not None:
            found += self._judge("slow-steps", step, state, patience=PATIENCE)
        if free_saves is not None and (least := self._limits.free_checkpoints) is not None:
            state = (
                free_saves < least,
                free_saves > FREE_OVER * least,
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
        if self._limits.restarts is None or recent < self._limits.restarts:
            return []
        return self.event("many-restarts", step, f"{recent} lives began within an hour")

    def _slow(self, record: Mapping[str, Any]) -> State | None:
        step_s, slower = _number(record, "perf/step_s"), self._limits.slow_steps
        if step_s is None or slower is None:
            return None
        usual = statistics.median(self._step_s) if len(self._step_s) >= USUAL // 2 else None
        slow = usual is not None and step_s >= slower * usual
        self._slow_in_a_row = self._slow_in_a_row + 1 if slow else 0
        if not slow or self._slow_in_a_row > 2 * USUAL:  # slow ones are not what is usual, unless they have come to be
            self._step_s.append(step_s)
        if usual is None:
            return None
        words = f"{step_s:.3g} s a step, usually {usual:.3g} s"
        return step_s >= slower * usual, step_s < (1 + SLOWER_OVER * (slower - 1)) * usual, words

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


def _slow_data(record: Mapping[str, Any], limits: AlertsConfig) -> State | None:
    share, most = _number(record, "data/stall_frac"), limits.stall_frac
    if share is None or most is None:
        return None
    return share >= most, share < STALL_OVER * most, f"ranks wait for data {share:.0%} of the time"


def _bad_samples(record: Mapping[str, Any], limits: AlertsConfig) -> State | None:
    count, least = _number(record, "data/substituted"), limits.bad_samples
    if count is None or least is None:
        return None
    return count >= least, count < least, f"{count:.0f} samples since the last record could not be read"


def _save_refused(record: Mapping[str, Any], _: AlertsConfig) -> State | None:
    if (count := _number(record, "ckpt/failed")) is None:
        return None
    return count > 0, count == 0, f"{count:.0f} saves in a row were refused"


def _dead_experts(record: Mapping[str, Any], limits: AlertsConfig) -> State | None:
    """Experts whose gates add up to next to nothing, where a metric counts them; a certain router where entropies are known."""
    counted, entropy = (
        {name: _number(record, name) for name in record if limit is not None and re.fullmatch(rf"moe/L\d+/{of}", name)}
        for of, limit in (("dead_experts", limits.dead_experts), ("entropy", limits.router_entropy))
    )
    least, sure_below = limits.dead_experts or 0, limits.router_entropy or 0.0
    if not counted and not entropy:
        return None
    dead = [
        f"{name.split('/')[1]} has {n:g} experts whose gates add up to less than a tenth of the mean"
        for name, n in counted.items()
        if n is not None and n >= least
    ]
    sure = [
        f"{name.split('/')[1]}'s router is certain (entropy {x:.3g} of log E)"
        for name, x in entropy.items()
        if x is not None and x < sure_below
    ]
    calm = not dead and all(x is None or x > ENTROPY_OVER * sure_below for x in entropy.values())
    return bool(dead or sure), calm, "; ".join([*dead, *sure][:4]) or "each expert works"


_RULES: Mapping[str, Callable[[Mapping[str, Any], AlertsConfig], State | None]] = {
    "slow-data": _slow_data,
    "bad-samples": _bad_samples,
    "save-refused": _save_refused,
    "dead-experts": _dead_experts,
}
_AT_ONCE = {"bad-samples", "save-refused"}
_EVENTS = {"non-finite", "loss-spike", "many-restarts"}

"""What becomes of a run whose step looks wrong: its update was refused on the device (`device_guard`), this is what the host makes
of it when it learns of that, from the same facts on every rank.

not finite   the loss, an auxiliary loss or the gradient norm       `health.non_finite`
a spike      a finite loss far above the median of the last ones    `health.spike`
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ecdit_train.config.life import HealthConfig
from ecdit_train.errors import NonFiniteError
from ecdit_train.parallel.runtime import Runtime

from .device_guard import SCALE, DeviceGuard
from .step import Numbers

LOOK_BACK = 1000
"""Steps in which `health.max_skips` counts."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What to do with a step; `words` say why, for people."""

    act: Literal["update", "report", "skip", "roll_back", "stop"]
    words: str = ""
    alert: Literal["", "non-finite", "loss-spike"] = ""
    """What it is called in `observe.alerts`; empty for an update."""


class Guard:
    """Judges every step of a life. What it remembers is in the checkpoints: a budget is the run's, not a life's."""

    def __init__(self, config: HealthConfig, *, runtime: Runtime) -> None:
        self._config, self._runtime = config, runtime
        self.device = DeviceGuard(config)
        self._losses: deque[float] = deque(maxlen=config.spike_window)
        self.skipped: list[dict[str, Any]] = []
        """Updates left out: step, first and last sample position, why, and how many batches went with them."""
        self.roll_backs = 0

    @property
    def batches_left_out(self) -> int:
        return sum(int(entry["batches"]) for entry in self.skipped)

    def judge(self, numbers: Numbers) -> Verdict:
        """Numbers of two ranks may differ in a last bit, but not what the device made of them: the same act on all ranks.
        Collective where something is wrong."""
        if not numbers.finite:
            words = f"{numbers}{self._culprits(numbers)}"
            verdict = Verdict(act=self._config.non_finite, words=words, alert="non-finite")
        elif numbers.spike and self._config.spike != "ignore":
            median, deviation = self._usual()
            far = (numbers.loss - median) / deviation if deviation else math.inf
            words = f"loss {numbers.loss:.6g} is {far:.3g} deviations above the median {median:.6g} of {len(self._losses)} steps"
            verdict = Verdict(act=self._config.spike, words=words, alert="loss-spike")
        else:
            verdict = Verdict(act="update")
        assert numbers.applied == (verdict.act in ("update", "report")), f"{verdict.act}, applied: {numbers.applied}"
        if numbers.applied:
            self._losses.append(numbers.loss)
        return verdict

    def go_on(self) -> None:
        """Updates are made again, after one that was not or with what a checkpoint says."""
        self.device.go_on(list(self._losses))

    def left_out(self, step: int, *, first: int, last: int, words: str, act: Literal["skip", "roll_back"]) -> None:
        """Notes an update that is not made. Raises NonFiniteError where the budget is spent."""
        where = f"step {step}, samples {first} to {last}"
        self.skipped.append({"step": step, "first": first, "last": last, "why": words, "act": act, "batches": 1})
        if act == "roll_back":
            self.roll_backs += 1
            if self.roll_backs > self._config.max_roll_backs:
                raise NonFiniteError(
                    f"{where}: {words}; the run went back {self._config.max_roll_backs} times (health.max_roll_backs)"
                )
            return
        recent = sum(s["act"] == "skip" and s["step"] > step - LOOK_BACK for s in self.skipped)
        if recent > self._config.max_skips:
            raise NonFiniteError(
                f"{where}: {words}; {recent} updates in {LOOK_BACK} steps, health.max_skips = {self._config.max_skips}"
            )

    def _usual(self) -> tuple[float, float]:
        """Median and robust standard deviation of the last losses."""
        median = statistics.median(self._losses)
        return median, SCALE * statistics.median(abs(loss - median) for loss in self._losses)

    def _culprits(self, numbers: Numbers) -> str:
        """The ranks whose own loss is not finite. Collective; only called when all know that something is wrong."""
        said = self._runtime.all_gather_json(numbers.own_finite)
        ranks = [rank for rank, fine in enumerate(said) if not fine]
        if self._runtime.world == 1:
            return ""
        return (
            f" (first seen in the loss of rank {', '.join(map(str, ranks[:8]))})"
            if ranks
            else " (every rank's own loss is finite)"
        )

    def state_dict(self) -> dict[str, Any]:
        """JSON, the same on all ranks: the first one's."""
        return self._runtime.broadcast_object(
            {"losses": list(self._losses), "skipped": self.skipped, "roll_backs": self.roll_backs}
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """`{}` for a checkpoint of before there were guards."""
        self._losses.clear()
        self._losses.extend(state.get("losses", ()))
        self.skipped = list(state.get("skipped", ()))
        self.roll_backs = int(state.get("roll_backs", 0))
        self.go_on()

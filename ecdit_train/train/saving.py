"""When a run saves, how, and what becomes of a save that fails. All ranks decide alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from ecdit_train.checkpoint.failures import CheckpointStorageError
from ecdit_train.checkpoint.layout import Value
from ecdit_train.checkpoint.manager import CheckpointManager, Committed
from ecdit_train.config.life import CheckpointConfig
from ecdit_train.errors import StorageError
from ecdit_train.parallel.runtime import Runtime

PATIENCE = 3
"""Saves in a row that may fail for want of a disk; one more would risk more work than a stop costs."""

FIRST = 50
"""Steps before the first save of a life whose interval is to be derived: until one was made, nobody knows what it costs."""


class Saves:
    """The saves of one life of a run.

    A disk that is full or gone does not end the run at once: the step is given up, said, and the next interval tries again. It does
    where going on would lose too much (PATIENCE), and where it was the last save of a stop or of the run.
    """

    def __init__(
        self,
        manager: CheckpointManager,
        config: CheckpointConfig,
        *,
        runtime: Runtime,
        say: Callable[[str], None],
        enter: Callable[[], None] = lambda: None,
    ) -> None:
        """`enter` is told at the beginning of each save and of each commit of one that was in flight."""
        self._enter = enter
        self.manager = manager
        self._config = config
        self._runtime = runtime
        self._say = say
        self._asked = -1
        self._failed = 0
        self._interval = FIRST
        self._next = FIRST
        self._since = (0, time.monotonic())
        self._mark = self._since
        self._record: dict[str, float] = {}
        self._safe_at = time.monotonic()
        """When nothing was left that could be lost."""
        self.committed = -1
        """The newest step that is committed."""

    def start(self, step: int, *, committed: bool) -> None:
        """A life begins at `step`, which is a committed one or is not."""
        self.committed = self._asked = step if committed else -1
        self._interval, self._next = FIRST, step + FIRST
        self._safe_at = time.monotonic()
        self._mark = self._since = (step, time.monotonic())

    def due(self, step: int) -> bool:
        if self._config.every_steps is not None:
            return step % self._config.every_steps == 0
        return step >= self._next and self.manager.in_flight is None

    def copied(self) -> None:
        """Wait until what is being saved may change; called before each update."""
        self.manager.copied()

    @property
    def writing(self) -> bool:
        """Whether this rank's part of a save is still being written."""
        return self.manager.writing

    def save(
        self,
        step: int,
        *,
        tensors: Callable[[], Mapping[str, Value]],
        objects: Callable[[], Mapping[str, Any]],
        lineage: Mapping[str, Any],
        last: bool,
    ) -> None:
        """Save `step`, unless it is saved. `last`: nothing comes after it, so it is committed when this returns; raises
        StorageError where that fails."""
        self.settle(last=last and step == self._asked)
        if step == self._asked and (step == self.committed or not last):
            return
        self._asked, self._mark = step, (step, time.monotonic())
        beside = self.manager.saver is not None and not last
        call = self.manager.begin if beside else self.manager.save
        self._tried(
            lambda: call(step, tensors=tensors(), objects=objects(), lineage=dict(lineage)), step=step, last=last
        )

    def settle(self, *, last: bool = False) -> None:
        """Commit what is in flight; waits for it."""
        if (step := self.manager.in_flight) is not None:
            self._tried(self.manager.settle, step=step, last=last)

    def _tried(self, call: Callable[[], Committed | None], *, step: int, last: bool) -> None:
        self._enter()
        try:
            done = call()
        except CheckpointStorageError as error:
            self._failed += 1
            self._record["ckpt/failed"] = self._failed
            if last or self._failed > PATIENCE:
                newest = self.committed if self.committed >= 0 else "none of this life"
                raise StorageError(
                    f"step {step} could not be saved ({self._failed} in a row); newest committed step: {newest}: {error}"
                ) from error
            self._next = step + self._interval
            self._say(f"step {step} was not saved, training goes on ({self._failed} of {PATIENCE} in a row): {error}")
            return
        if done is not None:
            self._note(done)

    def _note(self, done: Committed) -> None:
        for line in done.told:
            self._say(line)
        self._failed = 0
        self._safe_at = self._mark[1]
        self.committed = done.step
        self._record |= {
            "ckpt/step": done.step,
            "ckpt/blocked_s": done.blocked,
            "ckpt/save_s": done.seconds,
            "ckpt/failed": 0,
        }
        if self._config.every_steps is None:
            (first, began), (asked, at) = self._since, self._mark
            step_s = max((at - began) / max(asked - first, 1), 1e-9)
            cost, whole, step_s = self._runtime.broadcast_object([done.blocked, done.seconds, step_s])
            steps = interval(cost, step_s=step_s, hours_between_failures=self._config.hours_between_failures)
            self._interval = max(steps, math.ceil(whole / step_s))  # no save waits for the one before it
            self._next, self._since = done.step + self._interval, (asked, at)
            self._record["ckpt/interval"] = self._interval

    def record(self) -> dict[str, float]:
        """What happened since the last call, and how old the newest commit is."""
        record, self._record = self._record, {}
        return record | {"ckpt/age_s": time.monotonic() - self._safe_at}

    def close(self) -> None:
        self.manager.close()


def interval(cost: float, *, step_s: float, hours_between_failures: float) -> int:
    """Steps between saves that lose least: sqrt(2 * cost * mean time between failures), J. W. Young, CACM 17(9), 1974.

    Args:
        cost: seconds that training waits for a save.
        step_s: seconds of a step.
    """
    return max(1, round(math.sqrt(2 * cost * hours_between_failures * 3600) / step_s))

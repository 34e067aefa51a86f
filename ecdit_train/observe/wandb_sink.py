"""A copy of the records at Weights & Biases.

W&B can never block, slow or kill a rank: every call to it (`wandb_run.py`) is made by a `CallQueue`. A full queue drops
records, an exception becomes one warning line, closing is limited in time.
Nothing is lost by any of these: what W&B lacks of the run's rows the next life sends out of the journal, or
`ecdit dash sync` (`observe.wandb_sync`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ecdit_train.config.slots import SinkConfig

from . import reach, wandb_names, wandb_run
from .call_queue import CallQueue
from .sinks import Once, Record, SinkContext
from .wandb_run import CLOSE_SECONDS, LOCAL_SECONDS, Mode, Session

logger = logging.getLogger("ecdit.observe")


@dataclass(frozen=True, kw_only=True)
class Wandb(SinkConfig):
    """Weights & Biases."""

    mode: Mode
    """offline: a local folder in the run folder, `ecdit dash sync` later; online: needs W&B's own login."""
    project: str
    """W&B project name."""
    entity: str | None
    """W&B user or team; null: the login's default."""
    name: str | None
    """Name of the run; null: run folder, experiment, number of experts and seed."""
    group: str | None
    """Runs that belong together; null: the sweep, or the experiment."""
    tags: tuple[str, ...]
    """Beside size, router, layout and precision, which are tags by themselves."""
    notes: str | None
    """A sentence about the run."""
    rows: Literal["committed", "at_once"]
    """When a row goes to W&B, where it can never be taken back. committed: once a checkpoint holds its step, so that restarts and
    roll-backs leave no trace; at_once: live, and what is trained again keeps its first values there."""

    def check(self, run: Any, check: Any, *, key: str) -> None:
        check.require(bool(self.project.strip()), f"{key}.project", rule="must not be empty", nearest="ecdit")
        for name in ("project", "entity"):
            value = getattr(self, name) or ""
            bad = sorted(set("/\\#?%:") & set(value))
            rule = f"W&B takes no {' '.join(bad)} in a name; a server's address is WANDB_BASE_URL"
            check.require(not bad, f"{key}.{name}", rule=rule, nearest="".join(c for c in value if c not in bad))
        for name, most in (("name", wandb_names.MAX_NAME), ("group", wandb_names.MAX_NAME)):
            value = getattr(self, name) or ""
            check.require(len(value) <= most, f"{key}.{name}", rule=f"at most {most} characters", nearest=value[:most])
        most = wandb_names.MAX_TAG
        long = next((tag for tag in self.tags if not 0 < len(tag) <= most), None)
        check.require(long is None, f"{key}.tags", rule=f"each of 1 to {most} characters", nearest=(long or "")[:most])

    def open(self, run: SinkContext) -> WandbSink:
        return WandbSink(run, self)


Call = Callable[["Session"], None]


class WandbSink:
    """A run at W&B with a stable id (`<run>/wandb_id`), so that a requeue continues the same curves.

    Offline, and online where nobody lets us in, `<run>/wandb/offline-run-*` is what W&B's own tools read; `ecdit
    dash sync` brings the run there later. Credentials come from W&B's own places (WANDB_API_KEY, ~/.netrc),
    never from the configuration.
    """

    def __init__(
        self, run: SinkContext, config: Wandb, *, queue_size: int = 2048, close_timeout: float | None = None
    ) -> None:
        self._run, self._config = run, config
        self._once = Once()
        self._mode = self._allowed(config.mode)
        own = CLOSE_SECONDS if self._mode == "online" else LOCAL_SECONDS
        self._close_timeout = own if close_timeout is None else close_timeout
        self._id = wandb_run.stable_id(run.folder)
        # No holes: what is left out is the end, which a later life sends.
        self._queue = CallQueue(
            "wandb-sink", open=self._open, shut=Session.close, fails=self._failed, size=queue_size, holes=False
        )
        self._queue.start()

    def log(self, step: int, record: Record) -> None:
        values = dict(record)
        self._put(lambda session: session.log(step, values))

    def images(self, path: Path, key: str, step: int, caption: str) -> None:
        self._put(lambda session: session.image(path, key, step, caption))

    def committed(self, step: int) -> None:
        self._put(lambda session: session.commit(step))

    def rewind(self, step: int) -> None:
        self._put(lambda session: session.rewind(step))

    def alert(self, alert: Any) -> None:
        self._put(lambda session: session.alert(alert))

    def close(self, timeout: float | None = None) -> None:
        """Writes what is queued, finishes the run and stops W&B's process, all within `timeout` seconds."""
        if self._queue.closed:
            return
        timeout = self._close_timeout if timeout is None else timeout
        if not self._queue.close(within=timeout):
            self._warn(f"W&B did not finish within {timeout:g} s; {self._later()}")
            wandb_run.end_service()
        elif self._queue.lost:
            logger.warning("W&B was too slow, %d calls were left out; %s", self._queue.lost, self._later())

    def _later(self) -> str:
        return f"nothing is lost: the next life sends the rest, or ecdit dash sync {self._run.folder}"

    def _put(self, call: Call) -> None:
        if not self._queue.put(call):
            self._warn(f"W&B is behind, and gets nothing more in this life: its rows have no hole; {self._later()}")

    def _warn(self, message: str) -> None:
        self._once.warn(message, kind=message[:24])

    def _failed(self, error: BaseException) -> None:
        self._warn(f"W&B: {type(error).__name__}: {error}; {self._later()}")

    def _allowed(self, mode: Mode) -> Mode:
        if mode == "offline" or reach.key() is not None:
            return mode
        self._warn(
            "W&B: no key here (wandb login, or WANDB_API_KEY), so this life is written to "
            f"{self._run.folder}/wandb; send it from where there is one: ecdit dash sync {self._run.folder}"
        )
        return "offline"

    def _open(self) -> Session | None:
        """In the queue's thread."""
        try:
            session = self._session()
        except BaseException as error:
            self._warn(f"W&B is off for this run: {type(error).__name__}: {error}")
            return None
        if self._queue.abandoned:
            wandb_run.end_service()  # else its exit hook would keep the process
            return None
        return session

    def _session(self) -> Session:
        """Offline where W&B does not take the run: nothing is lost by it, and one line says so."""
        mode = self._mode
        how: Any = {"identity": self._id, "wanted": lambda: not self._queue.abandoned}
        try:
            return Session(self._run, self._config, mode=mode, **how)
        except BaseException as error:
            if mode == "offline" or self._queue.abandoned:
                raise
            wandb_run.end_service()
            self._warn(
                f"W&B does not take the run ({type(error).__name__}: {error}), so this life is written to "
                f"{self._run.folder}/wandb; later: ecdit dash sync {self._run.folder}"
            )
        return Session(self._run, self._config, mode="offline", **how)

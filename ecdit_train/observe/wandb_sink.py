"""A copy of the records at Weights & Biases. The only importer of wandb.

W&B can never block, slow or kill a rank: every call to it happens in one daemon thread behind a bounded queue. A full
queue drops records (the JSONL file has them), an exception becomes one warning line, closing is limited in time.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from ecdit_train import atomic
from ecdit_train import run_folder as folder
from ecdit_train.config.slots import SinkConfig

from . import reach
from .redact import redact, redact_text
from .sinks import Record, SinkContext

logger = logging.getLogger("ecdit.observe")

STEP = "train/step"
"""W&B's x axis."""
UNREACHABLE_SECONDS = 3.0
"""With `reach.PROBE_SECONDS`: what closing costs at most when nobody answers."""


@dataclass(frozen=True, kw_only=True)
class Wandb(SinkConfig):
    """Weights & Biases."""

    mode: Literal["offline", "online"]
    """offline: a local folder in the run folder, sync later; online: needs W&B's own login."""
    project: str
    """W&B project name."""

    def open(self, run: SinkContext) -> WandbSink:
        return WandbSink(run.folder, project=self.project, mode=self.mode, config=run.config, name=run.name)


Call = Callable[[ModuleType, Any], None]


class WandbSink:
    """A run at W&B with a stable id (`<run>/wandb_id`), so that a requeue continues the same curves.

    `mode` offline writes `<run>/wandb/offline-run-*` for a later `wandb sync`.
    Credentials come from W&B's own places (WANDB_API_KEY, ~/.netrc), never from the configuration.
    """

    def __init__(
        self,
        run_folder: Path,
        *,
        project: str,
        mode: Literal["offline", "online"],
        config: Mapping[str, Any],
        name: str,
        queue_size: int = 2048,
        close_timeout: float = 60.0,
    ) -> None:
        self._close_timeout = close_timeout
        self._queue: queue.Queue[Call | None] | None = None
        self._dropped = 0
        self._warned = False
        self._row: int | None = None
        """The step of the last row."""
        self._settings: dict[str, Any] = {
            "id": _stable_id(run_folder),
            "dir": str(run_folder),
            "project": project,
            "name": name,
            "mode": mode,
            "config": redact(config),
            "resume": "allow",
            "group": name,
        }
        self._queue = queue.Queue(maxsize=queue_size)
        self._thread = threading.Thread(target=self._work, args=(self._queue,), name="wandb-sink", daemon=True)
        self._thread.start()

    def log(self, step: int, record: Record) -> None:
        payload = {STEP: step, **record}
        self._put(lambda wandb, run: self._add(run, payload, step=step))

    def images(self, path: Path, key: str, step: int, caption: str) -> None:
        self._put(
            lambda wandb, run: self._add(run, {STEP: step, key: wandb.Image(str(path), caption=caption)}, step=step)
        )

    def _add(self, run: Any, payload: dict[str, Any], *, step: int) -> None:
        """W&B's own counter restarts in every attempt where it is left alone, so it is set to `step`; but it only grows, and rows
        below it are dropped. After a roll-back, in this life or an earlier one, rows get the next free number until
        `step` is past it again. The x axis is STEP all the while. Without a number a row would be merged with the last one."""
        if self._row is None:
            number = max(step, run.step)
        else:
            number = run.step if self._row == step else max(step, run.step + 1)
        self._row = step
        run.log(payload, step=number)

    def close(self, timeout: float | None = None) -> None:
        """Writes what is queued, finishes the run and stops W&B's process, all within `timeout` seconds; UNREACHABLE_SECONDS are
        enough where W&B cannot be reached: what it has is on disk, for `wandb sync`."""
        if self._queue is None:
            return
        timeout = self._close_timeout if timeout is None else timeout
        if self._settings["mode"] == "online" and not reach.answers():
            timeout = min(timeout, UNREACHABLE_SECONDS)
        deadline = time.monotonic() + timeout
        work, self._queue = self._queue, None
        with contextlib.suppress(queue.Full):
            work.put(None, timeout=timeout)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._warn(f"W&B did not finish within {timeout:.0f} s; metrics.jsonl is complete")
            _kill_service()
        elif self._dropped:
            logger.warning("W&B was too slow for %d records; metrics.jsonl has them", self._dropped)

    def _put(self, call: Call) -> None:
        if self._queue is None:
            return
        try:
            self._queue.put_nowait(call)
        except queue.Full:
            self._dropped += 1
            self._warn("W&B is behind, records are left out there; metrics.jsonl has them")

    def _warn(self, message: str) -> None:
        if not self._warned:
            self._warned = True
            logger.warning("%s", redact_text(" ".join(message.split())))

    def _work(self, work: queue.Queue[Call | None]) -> None:
        """The thread: the only place that calls wandb."""
        try:
            wandb, run = _start(self._settings, finish_timeout=self._close_timeout)
        except BaseException as error:  # wandb raises SystemExit and KeyboardInterrupt in places
            self._warn(f"W&B is off for this run: {type(error).__name__}: {error}")
            while work.get() is not None:
                pass
            return
        while (call := work.get()) is not None:
            self._guard(lambda call=call: call(wandb, run))  # type: ignore[misc]
        self._guard(run.finish)
        # finish() returns before the file is written; teardown() waits for W&B's process.
        self._guard(wandb.teardown)

    def _guard(self, call: Callable[[], object]) -> None:
        try:
            call()
        except BaseException as error:
            self._warn(f"W&B: {type(error).__name__}: {error}")


def _stable_id(run_folder: Path) -> str:
    path = run_folder / folder.WANDB_ID
    if path.exists() and (known := path.read_text().strip()):
        return known
    fresh = secrets.token_hex(6)
    atomic.write(path, f"{fresh}\n".encode())
    return fresh


def _start(settings: dict[str, Any], *, finish_timeout: float) -> tuple[ModuleType, Any]:
    """Imports and starts W&B: nothing of the machine, the command line, the console or the code leaves it."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    quiet = wandb.Settings(
        silent=True,
        console="off",
        disable_git=True,
        disable_code=True,
        save_code=False,
        x_disable_stats=True,
        x_disable_meta=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
        init_timeout=120.0,
        finish_timeout=max(1.0, finish_timeout),
    )
    run = wandb.init(**settings, settings=quiet)
    run.define_metric(STEP)
    run.define_metric("*", step_metric=STEP)
    return wandb, run


def _kill_service() -> None:
    """Ends W&B's process, for which its exit hook would wait without limit (wandb 0.31: the handle is private)."""
    try:
        from wandb.sdk import wandb_setup

        connection = wandb_setup.singleton()._connection
        connection._cleanup()  # type: ignore[union-attr, misc]  # takes the exit hook away
        connection._proc._process.kill()  # type: ignore[union-attr]
    except Exception:
        logger.debug("no W&B process to end", exc_info=True)

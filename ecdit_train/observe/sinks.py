"""Where records go: a local JSONL file, which is the truth, and W&B, which is a copy of it. Only importer of wandb.

W&B can never block, slow or kill a rank: every call to it happens in one daemon thread behind a bounded queue. A full
queue drops records (the JSONL file has them), an exception becomes one warning line, closing is limited in time.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import queue
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol

from . import folder

Value = float | int | str | None
Record = Mapping[str, Value]

logger = logging.getLogger("ecdit.observe")

STEP = "train/step"
"""W&B's x axis."""


class Sink(Protocol):
    """Something that keeps records and pictures."""

    def log(self, step: int, record: Record) -> None: ...

    def images(self, path: Path, key: str, step: int, caption: str) -> None: ...

    def close(self) -> None: ...


# --- the truth -------------------------------------------------------------------------------------------------------


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Records in file order; a cut last line (the writer was killed) is left out, a missing file is no records."""
    if not path.exists():
        return []
    records = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("not an object")
        except ValueError:
            if number < len(lines):
                logger.warning("%s line %d is not a JSON object, left out", path, number)
            continue
        records.append(record)
    return records


class JsonlSink:
    """Appends `{"step": ..., "time": ..., key: value}`, one object per line, in the file after every call.

    `time` is seconds since the epoch. Non-finite values are written as null, so that every line is JSON.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._end_on_a_line()
        self._file: io.TextIOWrapper = path.open("a", encoding="utf-8")

    def _end_on_a_line(self) -> None:
        """Removes a cut last line, onto which the next record would be glued."""
        if not self.path.exists():
            return
        data = self.path.read_bytes()
        if data and not data.endswith(b"\n"):
            folder.write_atomically(self.path, data[: data.rfind(b"\n") + 1])

    def log(self, step: int, record: Record) -> None:
        line = {"step": step, "time": round(time.time(), 3)} | {k: _finite(v) for k, v in record.items()}
        self._file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()

    def images(self, path: Path, key: str, step: int, caption: str) -> None:
        """Pictures are files of the run folder already."""

    def truncate_after(self, step: int) -> int:
        """On resume from `step`: drops the lines of larger steps, which will be trained again. Returns how many."""
        self._file.close()
        kept, dropped = [], 0
        for record in read_jsonl(self.path):
            if record.get("step", 0) > step:
                dropped += 1
            else:
                kept.append(json.dumps(record, ensure_ascii=False) + "\n")
        if dropped:
            folder.write_atomically(self.path, "".join(kept).encode())
        self._file = self.path.open("a", encoding="utf-8")
        return dropped

    def close(self) -> None:
        self._file.close()


def _finite(value: Value) -> Value:
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- secrets ---------------------------------------------------------------------------------------------------------

_SECRET_NAME = re.compile(
    r"(api_?key|secret|passw(or)?d|credential|private_?key|(^|_)token$|(^|_)auth$)", re.IGNORECASE
)
_ASSIGNMENT = re.compile(r"\b([A-Za-z_][A-Za-z0-9_]*)(\s*[=:]\s*)([^\s,'\"\]]+)")
REDACTED = "[redacted]"


def redact_text(text: str) -> str:
    """Values of secret environment variables, and `NAME=value` where the name says secret, become [redacted]."""
    for name, value in os.environ.items():
        if len(value) >= 6 and _SECRET_NAME.search(name):
            text = text.replace(value, REDACTED)
    return _ASSIGNMENT.sub(lambda m: m[1] + m[2] + REDACTED if _SECRET_NAME.search(m[1]) else m[0], text)


def redact(value: Any, *, name: str = "") -> Any:
    """A configuration tree without secrets, for everything that leaves the machine."""
    if isinstance(value, Mapping):
        return {k: redact(v, name=str(k)) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(v, name=name) for v in value]
    if _SECRET_NAME.search(name) and value not in (None, ""):
        return REDACTED
    return redact_text(value) if isinstance(value, str) else value


# --- the copy --------------------------------------------------------------------------------------------------------

Call = Callable[[ModuleType, Any], None]


class WandbSink:
    """A run at W&B with a stable id (`<run>/wandb_id`), so that a requeue continues the same curves.

    `mode` offline writes `<run>/wandb/offline-run-*` for a later `wandb sync`; disabled does and imports nothing.
    Credentials come from W&B's own places (WANDB_API_KEY, ~/.netrc), never from the configuration.
    """

    def __init__(
        self,
        run_folder: Path,
        *,
        project: str,
        mode: Literal["offline", "online", "disabled"],
        config: Mapping[str, Any],
        name: str,
        queue_size: int = 2048,
        close_timeout: float = 60.0,
    ) -> None:
        self._close_timeout = close_timeout
        self._queue: queue.Queue[Call | None] | None = None
        self._dropped = 0
        self._warned = False
        if mode == "disabled":
            return
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
        """`step` is also W&B's own counter: left alone it restarts in every life, and rows get lost."""
        payload = {STEP: step, **record}
        self._put(lambda wandb, run: run.log(payload, step=step))

    def images(self, path: Path, key: str, step: int, caption: str) -> None:
        self._put(lambda wandb, run: run.log({STEP: step, key: wandb.Image(str(path), caption=caption)}, step=step))

    def close(self, timeout: float | None = None) -> None:
        """Writes what is queued, finishes the run and stops W&B's process, all within `timeout` seconds."""
        if self._queue is None:
            return
        timeout = self._close_timeout if timeout is None else timeout
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
    folder.write_atomically(path, f"{fresh}\n".encode())
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


# --- all of them -----------------------------------------------------------------------------------------------------


class Sinks:
    """All sinks as one; without any, every call does nothing (that is what ranks other than 0 have)."""

    def __init__(self, sinks: Iterable[Sink] = ()) -> None:
        self.sinks: Sequence[Sink] = tuple(sinks)

    def log(self, step: int, record: Record) -> None:
        for sink in self.sinks:
            sink.log(step, record)

    def image(self, path: Path, *, key: str, step: int, caption: str) -> None:
        """A PNG that lies in the run folder."""
        for sink in self.sinks:
            sink.images(path, key, step, caption)

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()


def open_sinks(
    run_folder: Path,
    *,
    rank: int,
    wandb_mode: Literal["offline", "online", "disabled"],
    wandb_project: str,
    config: Mapping[str, Any],
    name: str,
    resume_step: int,
) -> Sinks:
    """Rank 0 gets the JSONL file (cut back to `resume_step`, 0 for a fresh run) and W&B; other ranks a null object."""
    if rank != 0:
        return Sinks()
    local = JsonlSink(folder.metrics_path(run_folder))
    local.truncate_after(resume_step)
    return Sinks([local, WandbSink(run_folder, project=wandb_project, mode=wandb_mode, config=config, name=name)])

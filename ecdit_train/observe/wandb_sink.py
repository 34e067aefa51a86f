"""A copy of the records at Weights & Biases. The only importer of wandb.

W&B can never block, slow or kill a rank: every call to it happens in one daemon thread behind a bounded queue. A full
queue drops records, an exception becomes one warning line, closing is limited in time. Nothing is lost by any of these: what
W&B lacks of the run's rows the next life sends out of the journal, or `ecdit dash sync` (`observe.wandb_sync`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from ecdit_train import atomic
from ecdit_train import run_folder as folder
from ecdit_train.config.slots import SinkConfig

from . import reach, wandb_log, wandb_names
from .journal import read_records
from .redact import redact, redact_text
from .sinks import Record, SinkContext
from .wandb_rows import Rows

logger = logging.getLogger("ecdit.observe")

STEP = "train/step"
"""W&B's x axis. W&B's own counter `_step` is the same number, in every life."""
SUMMARIES = {
    "train/loss": "min,last",
    "validation/*": "min,last",
    "perf/images_per_s": "max,mean,last",
    "perf/mfu": "max,mean,last",
    "optim/grad_norm_max": "max,last",
}
"""What W&B keeps of a curve in its table of runs, where the last value is not enough."""
NOW = ("train/loss", "optim/lr", "perf/images_per_s", "data/stall_frac")
"""Of the newest record, in W&B's table of runs at once: a curve waits for its checkpoint."""
FLUSH_SECONDS = 2.0
"""How often W&B's service writes its file."""
CLOSE_SECONDS = 3.5
"""What closing costs at most, online: with the interpreter's own end, less than 5 s. The rest is on disk."""
LOCAL_SECONDS = 30.0
"""The same offline, where only this machine's processor and disk are in the way."""
START_SECONDS = 60.0
"""How long the thread waits for a server, while training goes on and rows wait."""

Mode = Literal["offline", "online"]


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
        own = CLOSE_SECONDS if config.mode == "online" else LOCAL_SECONDS
        self._close_timeout = own if close_timeout is None else close_timeout
        self._dropped = 0
        self._warned = False
        self._id = stable_id(run.folder)
        self._queue: queue.Queue[Call | None] | None = queue.Queue(maxsize=queue_size)
        self._thread = threading.Thread(target=self._work, args=(self._queue,), name="wandb-sink", daemon=True)
        self._thread.start()

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
        if self._queue is None:
            return
        timeout = self._close_timeout if timeout is None else timeout
        deadline = time.monotonic() + timeout
        work, self._queue = self._queue, None
        with contextlib.suppress(queue.Full):
            work.put(None, timeout=max(0.0, deadline - time.monotonic()))
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._warn(f"W&B did not finish within {timeout:g} s; {self._later()}")
            end_service()
        elif self._dropped:
            logger.warning("W&B was too slow for %d records; %s", self._dropped, self._later())

    def _later(self) -> str:
        return f"nothing is lost: the next life sends the rest, or ecdit dash sync {self._run.folder}"

    def _put(self, call: Call) -> None:
        if self._queue is None:
            return
        try:
            self._queue.put_nowait(call)
        except queue.Full:
            self._dropped += 1
            self._warn(f"W&B is behind, records are left out there; {self._later()}")

    def _warn(self, message: str) -> None:
        if not self._warned:
            self._warned = True
            logger.warning("%s", redact_text(" ".join(message.split())))

    def _work(self, work: queue.Queue[Call | None]) -> None:
        """The thread: the only place that calls wandb."""
        try:
            session = self._open()
        except BaseException as error:  # wandb raises SystemExit and KeyboardInterrupt in places
            self._warn(f"W&B is off for this run: {type(error).__name__}: {error}")
            while work.get() is not None:
                pass
            return
        while (call := work.get()) is not None:
            self._guard(lambda call=call: call(session))  # type: ignore[misc]
        self._guard(session.close)

    def _open(self) -> Session:
        """Offline where online is asked for and nobody lets us in: nothing is lost by it, and one line says so."""
        mode = self._config.mode
        if mode == "online" and reach.key() is None:
            mode = "offline"
            self._warn(
                "W&B: no key here (wandb login, or WANDB_API_KEY), so this life is written to "
                f"{self._run.folder}/wandb; send it from where there is one: ecdit dash sync {self._run.folder}"
            )
        try:
            return Session(self._run, self._config, mode=mode, identity=self._id)
        except BaseException as error:
            if mode == "offline":
                raise
            end_service()
            self._warn(
                f"W&B does not take the run ({type(error).__name__}: {error}), so this life is written to "
                f"{self._run.folder}/wandb; later: ecdit dash sync {self._run.folder}"
            )
        return Session(self._run, self._config, mode="offline", identity=self._id)

    def _guard(self, call: Callable[[], object]) -> None:
        try:
            call()
        except BaseException as error:
            self._warn(f"W&B: {type(error).__name__}: {error}; {self._later()}")


class Session:
    """One connection to W&B, or one offline folder. Blocks; used in the sink's thread and by `ecdit dash sync`.

    It begins where W&B has the run: online its server is asked, offline its files are read. Rows after that which the journal has,
    up to the step this life goes on from, are sent first: they were on their way when the last life ended.
    """

    def __init__(
        self,
        run: SinkContext,
        config: Wandb,
        *,
        mode: Mode,
        identity: str,
        patience: float = CLOSE_SECONDS,
        files: Path | None = None,
    ) -> None:
        """`patience`: seconds that an upload may take at the end; `files`: where W&B keeps files of its own,
        default the run folder."""
        self._folder, self.count = run.folder, 0
        has = newest_row(run.folder) if mode == "offline" else 0
        self._wandb, self._at = _start(run, config, mode=mode, identity=identity, patience=patience, files=files)
        self.url: str | None = self._at.url
        if mode == "online":
            has = max(0, int(self._at.starting_step) - 1)
        self.had = has
        """The newest step that W&B had."""
        self.rows = Rows(sent=has, committed=run.resume_step, waits=config.rows == "committed")
        if run.resume_step > has:
            self._catch_up(has, to=run.resume_step)
        self._send()

    def log(self, step: int, values: Record) -> None:
        self.rows.add(step, {STEP: step, **values})
        now = {f"now/{name.rpartition('/')[2]}": values[name] for name in NOW if name in values}
        self._at.summary.update({"now/step": step, **now})
        self._send()

    def image(self, path: Path, key: str, step: int, caption: str) -> None:
        self.rows.add(step, {STEP: step, key: _Picture(path=path, caption=caption)})
        self._send()

    def commit(self, step: int) -> None:
        self.rows.commit(step)
        self._send()

    def rewind(self, step: int) -> None:
        self.rows.rewind(step)

    def alert(self, alert: Any) -> None:
        level = {"info": "INFO", "warning": "WARN", "error": "ERROR"}[alert.level]
        self._at.alert(title=alert.name, text=redact_text(str(alert)), level=level, wait_duration=0)

    def close(self) -> None:
        self._send(last=True)
        self._at.finish()
        # finish() returns before the file is written; teardown() waits for W&B's process.
        self._wandb.teardown()

    def _catch_up(self, has: int, *, to: int) -> None:
        for record in read_records(self._folder):
            if has < (step := int(record.get("step", 0))) <= to:
                values = {k: float("nan") if v is None else v for k, v in record.items() if k not in ("step", "time")}
                self.rows.add(step, {STEP: step, **values})
        for step, path in folder.by_step(self._folder / folder.SAMPLES, suffix=".png"):
            if has < step <= to:
                self.rows.add(step, {STEP: step, GRID: _Picture(path=path, caption=f"step {step}")})

    def _send(self, *, last: bool = False) -> None:
        for step, row in self.rows.ready(last=last):
            self.count += 1
            ready = {k: v.load(self._wandb) if isinstance(v, _Picture) else v for k, v in row.items()}
            self._at.log({k: v for k, v in ready.items() if v is not None}, step=step, commit=True)


GRID = "samples/grid"
"""Pictures of the fixed prompts."""


@dataclass(frozen=True, kw_only=True)
class _Picture:
    path: Path
    caption: str

    def load(self, wandb: ModuleType) -> Any:
        """None for one that is not there (any more)."""
        return wandb.Image(str(self.path), caption=self.caption) if self.path.is_file() else None


def login_entity() -> str:
    """Whose the login is: the default user or team. Raises what W&B's client does."""
    import wandb

    return str(wandb.Api().default_entity)


def report_ids(*, entity: str, project: str) -> dict[str, str]:
    """Title -> id of a project's reports; empty where there is no such project."""
    import wandb

    try:
        return {str(page.display_name): str(page.id) for page in wandb.Api().reports(f"{entity}/{project}")}
    except (ValueError, wandb.errors.CommError):
        return {}


def stable_id(run_folder: Path) -> str:
    path = run_folder / folder.WANDB_ID
    if path.exists() and (known := path.read_text().strip()):
        return known
    fresh = secrets.token_hex(6)
    atomic.write(path, f"{fresh}\n".encode())
    return fresh


def newest_row(run_folder: Path) -> int:
    """The newest step in the run's files of W&B; 0 where there is none. Waits for a killed life's service to write its end."""
    files = sorted(run_folder.glob("wandb/*run-*/run-*.wandb"), key=lambda p: p.stat().st_mtime, reverse=True)
    for path in files:
        while not (seen := _rows_of(path)).ended and time.time() - path.stat().st_mtime < 2 * FLUSH_SECONDS:
            time.sleep(FLUSH_SECONDS / 4)
        if seen.newest:
            return seen.newest
    return 0


@dataclass(frozen=True, kw_only=True)
class _Seen:
    newest: int
    ended: bool


def _rows_of(path: Path) -> _Seen:
    from wandb.proto import wandb_internal_pb2

    newest, ended = 0, False
    for data in wandb_log.records(path):
        record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
        record.ParseFromString(data)
        ended |= record.WhichOneof("record_type") == "exit"
        for item in record.history.item:
            if "/".join(item.nested_key) == STEP or item.key == STEP:
                newest = max(newest, int(item.value_json))
    return _Seen(newest=newest, ended=ended)


def send_evaluation(run: SinkContext, config: Wandb, path: Path, *, patience: float, files: Path) -> str | None:
    """A result of `ecdit evaluate` as a run of its own in the training's group, of job type evaluate; returns its address.

    A run of its own, as only one process may write to one at a time, and rows come in order of steps: the training may be at work,
    and may be past that step. The same suite and step are the same run: again, they replace its summary and add no point.
    """
    result = json.loads(path.read_bytes())
    suite, step = path.stem.rpartition("_")[0] or path.stem, int(result["step"])
    flat = {f"eval/{suite}/{name}": value for name, value in result.items() if isinstance(value, int | float)}
    tasks = {str(name): float(share) for name, share in result.get("by_task", {}).items()}
    flat |= {f"eval/{suite}/{task}": share for task, share in tasks.items()}
    flat.pop(f"eval/{suite}/step", None)
    wandb, at = _start(
        run,
        config,
        mode="online",
        identity=f"{stable_id(run.folder)}-{suite}-{step}",
        patience=patience,
        files=files,
        job_type="evaluate",
        suffix=f", {suite} at step {step}",
    )
    if not at.starting_step:
        at.log({STEP: step, **flat}, step=step, commit=True)
    at.summary.update({STEP: step, **flat})
    at.finish()
    wandb.teardown()
    return at.url  # type: ignore[no-any-return]


def _start(
    run: SinkContext,
    config: Wandb,
    *,
    mode: Mode,
    identity: str,
    patience: float,
    files: Path | None = None,
    job_type: str = "train",
    suffix: str = "",
) -> tuple[ModuleType, Any]:
    """Imports and starts W&B: nothing of the machine, the command line, the console or the code leaves it,
    but what `lineage` says."""
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
        program="ecdit",
        host="-",  # else the name of this machine
        x_transaction_log_flush_interval=FLUSH_SECONDS,
        init_timeout=START_SECONDS,
        finish_timeout=patience if mode == "online" else LOCAL_SECONDS,
    )
    found = wandb_names.names(run.folder, run.config, tags=config.tags)
    life = {"number": run.life, "job": wandb_names.scheduled_as(os.environ), **run.lineage}
    at = wandb.init(
        id=identity,
        dir=str(files or run.folder),
        project=config.project,
        entity=config.entity,
        name=((config.name or found.name)[: wandb_names.MAX_NAME - len(suffix)] + suffix),
        group=config.group or found.group,
        job_type=job_type,
        tags=list(found.tags),
        notes=config.notes,
        mode=mode,
        config=redact({**run.config, "life": life}),
        allow_val_change=True,
        resume="allow",
        settings=quiet,
    )
    at.define_metric(STEP)
    at.define_metric("*", step_metric=STEP)
    for name, kept in SUMMARIES.items():
        at.define_metric(name, step_metric=STEP, summary=kept)
    return wandb, at


def end_service() -> None:
    """Ends W&B's process, for which its exit hook would wait without limit (wandb 0.31: the handle is private). A
    later start makes another."""
    try:
        from wandb.sdk import wandb_setup
        from wandb.sdk.lib.service import service_token

        setup, wandb_setup._singleton = wandb_setup._singleton, None
        service_token.clear_service_in_env()
        connection = setup._connection  # type: ignore[union-attr]
        connection._cleanup()  # type: ignore[union-attr, misc]  # takes the exit hook away
        connection._proc._process.kill()  # type: ignore[union-attr]
    except Exception:
        logger.debug("no W&B process to end", exc_info=True)

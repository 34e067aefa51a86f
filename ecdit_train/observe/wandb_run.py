"""One run at W&B: started, fed, ended. The only importer of wandb; everything here may block.

W&B's client is told to send nothing of the machine, the command line, the console or the code.
"""

from __future__ import annotations

import logging
import os
import secrets
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from ecdit_train import atomic
from ecdit_train import run_folder as folder

from . import wandb_log, wandb_names, wandb_tables
from .journal import read_records
from .redact import redact, redact_text
from .sinks import Record, SinkContext
from .wandb_rows import Rows
from .wandb_tables import Counted, Table

if TYPE_CHECKING:
    from .wandb_sink import Wandb

logger = logging.getLogger("ecdit.observe")

STEP = "train/step"
"""W&B's x axis. W&B's own counter `_step` is the same number, in every life."""
SUMMARIES = {
    "train/loss": "min,last",
    "eval/*": "min,last",
    "perf/images_per_s": "max,mean,last",
    "perf/mfu": "max,mean,last",
    "optim/grad_norm_max": "max,last",
}
"""What W&B keeps of a curve in its table of runs, where the last value is not enough."""
NOW = ("train/loss", "optim/lr", "perf/images_per_s", "data/stall_frac")
"""Of the newest record, in W&B's table of runs at once: a curve waits for its checkpoint."""
STATS_SECONDS = 15.0
"""How often W&B's service looks at processor, memory, disk and GPUs."""
FLUSH_SECONDS = 2.0
"""How often W&B's service writes its file."""
CLOSE_SECONDS = 3.5
"""What closing costs at most, online: with the interpreter's own end, less than 5 s. The rest is on disk."""
LOCAL_SECONDS = 30.0
"""The same offline, where only this machine's processor and disk are in the way."""
START_SECONDS = 60.0
"""How long the thread waits for a server, while training goes on and rows wait."""

Mode = Literal["offline", "online"]


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
        wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        """`wanted`: asked before W&B's process is started; `patience`: seconds that an upload may take at the end;
        `files`: where W&B keeps files of its own, default the run folder."""
        self._folder, self.count = run.folder, 0
        self._drawn = tempfile.TemporaryDirectory(prefix="ecdit-wandb-", ignore_cleanup_errors=True)
        has = newest_row(run.folder) if mode == "offline" else 0
        self._wandb, self._at = _start(
            run, config, mode=mode, identity=identity, patience=patience, files=files, wanted=wanted
        )
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
        self._drawn.cleanup()

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
            if GRID in row and MAPS not in row and (drawn := self._routing(step)) is not None:
                row[MAPS] = drawn
            row |= wandb_tables.histograms(self._folder, step)
            ready = {k: _loaded(v, self._wandb) for k, v in row.items()}
            self._at.log({k: v for k, v in ready.items() if v is not None}, step=step, commit=True)
            self.rows.done(step)
            self.count += 1

    def _routing(self, step: int) -> _Picture | None:
        """Experts per patch of the first prompt, by layer and timestep; drawn here, where nobody waits for it."""
        from .figures import allocation_heatmap  # imports torch, which a configuration with this sink must not
        from .routing import RoutingMaps

        path = Path(self._drawn.name) / f"routing_{step}.png"
        try:
            maps = RoutingMaps.load(folder.routing_path(self._folder, step=step))
            return _Picture(path=allocation_heatmap(maps, path), caption=f"step {step}: {maps.prompts[0]}")
        except Exception:  # a dense model has none, a damaged file is told elsewhere
            logger.debug("no routing picture of step %d", step, exc_info=True)
            return None


GRID = "samples/grid"
"""Pictures of the fixed prompts."""
MAPS = "samples/routing"
"""Beside them."""


@dataclass(frozen=True, kw_only=True)
class _Picture:
    path: Path
    caption: str


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
    newest, until = 0, time.monotonic() + 2 * FLUSH_SECONDS
    for path in run_folder.glob("wandb/*run-*/run-*.wandb"):
        while not (seen := _rows_of(path)).ended and time.monotonic() < until and _young(path):
            time.sleep(FLUSH_SECONDS / 4)
        newest = max(newest, seen.newest)  # times of files say nothing after a copy, or where a clock went back
    return newest


def _young(path: Path) -> bool:
    """Whether somebody may still be writing it."""
    return time.time() - path.stat().st_mtime < 2 * FLUSH_SECONDS


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


def send_result(run: SinkContext, config: Wandb, path: Path, *, patience: float, files: Path) -> str | None:
    """A result of `ecdit evaluate` or `ecdit allocation` as a run of its own in the training's group, of job type
    evaluate; returns its address.

    A run of its own, as only one process may write to one at a time, and rows come in order of steps: the training may be at work,
    and may be past that step. The same suite and step are the same run: again, they replace its summary and add no point.
    """
    result = wandb_tables.read(path)
    wandb, at = _start(
        run,
        config,
        mode="online",
        identity=f"{stable_id(run.folder)}-{result.suite}-{result.step}",
        patience=patience,
        files=files,
        job_type="evaluate",
        suffix=f", {result.suite} at step {result.step}",
    )
    shown: dict[str, Any] = {STEP: result.step, **result.numbers}
    shown |= {name: _loaded(table, wandb) for name, table in result.tables.items()}
    shown |= {name: wandb.Image(str(picture)) for name, picture in result.pictures.items()}
    if at.starting_step:
        at.summary.update(shown)
    else:
        at.log(shown, step=result.step, commit=True)
    at.finish()
    wandb.teardown()
    return at.url  # type: ignore[no-any-return]


def _loaded(value: Any, wandb: ModuleType) -> Any:
    """As W&B's client wants it; None for a picture that is not there (any more), or is none: its row is worth more."""
    if isinstance(value, _Picture):
        try:
            return wandb.Image(str(value.path), caption=value.caption) if value.path.is_file() else None
        except Exception as error:
            logger.warning("%s cannot be sent: %s", value.path, error)
            return None
    if isinstance(value, Table):
        return wandb.Table(columns=list(value.columns), data=[list(row) for row in value.rows])
    if isinstance(value, Counted):
        return wandb.Histogram(np_histogram=(list(value.counts), list(value.edges)))
    return value


def _start(
    run: SinkContext,
    config: Wandb,
    *,
    mode: Mode,
    identity: str,
    patience: float,
    files: Path | None = None,
    wanted: Callable[[], bool] = lambda: True,
    job_type: str = "train",
    suffix: str = "",
) -> tuple[ModuleType, Any]:
    """Imports and starts W&B: nothing of the machine, the command line, the console or the code leaves it,
    but what `lineage` says."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    if not wanted():
        raise InterruptedError("closed before it began")

    quiet = wandb.Settings(
        silent=True,
        console="off",
        disable_git=True,
        disable_code=True,
        save_code=False,
        x_disable_stats=job_type != "train",  # numbers of rank 0's machine, without its name
        x_stats_sampling_interval=STATS_SECONDS,
        x_disable_meta=True,
        x_disable_machine_info=job_type != "train",  # forbids those numbers, too
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
        name=redact_text((config.name or found.name)[: wandb_names.MAX_NAME - len(suffix)] + suffix),
        group=redact_text(config.group or found.group),
        job_type=job_type,
        tags=[redact_text(tag) for tag in found.tags],
        notes=redact_text(config.notes) if config.notes else None,
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

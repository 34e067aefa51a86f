"""`ecdit dash sync`: what W&B lacks of a run, out of its folder. Blocks; for people and cron, never for a rank.

W&B is asked how far it has the run, and gets the rows after that from the run's own log. So it may be called at any time and as
often as one likes, also while a run without internet trains, and it matters neither which lives were offline nor what became of
them. (`wandb sync` sends files instead: whole, once, and marks them as sent also where the server failed.)
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ecdit_train import atomic
from ecdit_train import run_folder as folder
from ecdit_train.errors import StorageError

from . import reach
from .journal import read_records
from .redact import redact_text
from .sinks import SinkContext
from .wandb_run import Session, end_service, send_result, stable_id
from .wandb_sink import Wandb

PATIENCE = 600.0
"""Seconds that an upload may take."""
EVALUATED_SECONDS = 30.0
"""The same for one result, right after it was written: pictures were drawn for minutes before."""
RESULTS = (folder.EVALUATION, folder.ALLOCATION)
"""Folders of what `ecdit evaluate` and `ecdit allocation` wrote."""
SENT = "evaluations.json"
"""In `<run>/wandb`: which results were sent, by the digest of their file."""


@dataclass(frozen=True, kw_only=True)
class Synced:
    """What was done."""

    had: int
    """The newest step that W&B had before."""
    has: int
    rows: int
    """Sent now."""
    waiting: int
    """Rows after the newest checkpoint: a resume may train their steps again."""
    evaluations: int
    """Results sent now."""
    offline: tuple[Path, ...]
    """Offline folders of W&B that hold nothing more than it now has."""
    url: str | None


def offline_folders(run: Path) -> list[Path]:
    return sorted(run.glob("wandb/offline-run-*"))


def sync(run: SinkContext, config: Wandb, *, alive: bool) -> Synced:
    """Send the rows up to `run.resume_step`, and results of evaluations.

    Args:
        alive: a life is at work: its own offline folder grows, and is not marked as sent.

    Raises:
        StorageError: W&B does not take them.
    """
    config = replace(config, mode="online", rows="committed")
    try:
        with tempfile.TemporaryDirectory(prefix="ecdit-sync-", ignore_cleanup_errors=True) as files:
            how: Any = {"patience": PATIENCE, "files": Path(files)}
            session = Session(run, config, mode="online", identity=stable_id(run.folder), **how)
            session.close()
            evaluations = _send_evaluations(run, config, **how)
    except BaseException as error:  # wandb raises SystemExit in places
        end_service()  # its exit hook would wait for the upload
        if isinstance(error, KeyboardInterrupt):
            raise
        words = redact_text(" ".join(f"{type(error).__name__}: {error}".split()))
        raise StorageError(f"W&B does not take {run.folder}: {words}") from error
    folders = offline_folders(run.folder)
    done = tuple(folders[:-1] if alive else folders)
    for file in (file for where in done for file in where.glob("run-*.wandb")):
        file.with_name(
            f"{file.name}.synced"
        ).touch()  # W&B's own mark: `wandb sync` would send those rows a second time
    return Synced(
        had=session.had,
        has=session.rows.sent,
        rows=session.count,
        waiting=sum(int(record.get("step", 0)) > run.resume_step for record in read_records(run.folder)),
        evaluations=evaluations,
        offline=done,
        url=session.url,
    )


def evaluated(
    run: SinkContext, sinks: Mapping[str, Any], path: Path, *, seconds: float = EVALUATED_SECONDS
) -> str | None:
    """Send a result that was just written, where the run is online and there is a key. Returns what to tell a person: where it is,
    or that it will be sent later; None where the run has no W&B. Takes `seconds` at most and raises nothing."""
    config = next((sink for sink in sinks.values() if isinstance(sink, Wandb)), None)
    if config is None:
        return None
    later = f"W&B has it after: ecdit dash sync {run.folder}"
    if config.mode == "offline" or reach.key() is None:
        return later
    found: list[str | None] = []

    def send() -> None:
        with contextlib.suppress(BaseException), tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as files:
            found.append(send_result(run, config, path, patience=seconds, files=Path(files)))

    thread = threading.Thread(target=send, name="wandb-evaluation", daemon=True)
    thread.start()
    thread.join(seconds)
    if not found:
        end_service()
        return f"W&B did not take it within {seconds:g} s; {later}"
    return f"W&B: {found[0]}"


def _send_evaluations(run: SinkContext, config: Wandb, **how: Any) -> int:
    state = run.folder / "wandb" / SENT
    known: dict[str, Any] = json.loads(state.read_bytes()) if state.exists() else {}
    count = 0
    for path in sorted(path for kind in RESULTS for path in (run.folder / kind).glob("*.json")):
        name, digest = str(path.relative_to(run.folder)), hashlib.sha256(path.read_bytes()).hexdigest()
        if known.get(name) != digest:
            send_result(run, config, path, **how)
            known[name] = digest
            state.parent.mkdir(exist_ok=True)
            atomic.write(state, json.dumps(known, indent=1).encode())
            count += 1
    return count

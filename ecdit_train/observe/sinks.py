"""Where records go: the journal (`journal.py`), which is the truth, and sinks that copy it elsewhere (a slot: `observe.sinks`).

A sink that raises is switched off with one warning; that it does not block is its own doing (`call_queue.py`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ecdit_train.config.life import AlertsConfig
from ecdit_train.config.slots import SinkConfig
from ecdit_train.supervise import alert_file, lives

from .alerts import Alert, Watch
from .journal import Journal, Record
from .redact import redact_text
from .room import Room

logger = logging.getLogger("ecdit.observe")


class Sink(Protocol):
    """Something that keeps records and pictures. One that has them is told besides: `rewind(step)`, that
    the run goes on from an earlier step; `committed(step)`, the newest one that it cannot go back
    behind; `alert(alert)`, an `observe.alerts.Alert`."""

    def log(self, step: int, record: Record) -> None: ...

    def images(self, path: Path, key: str, step: int, caption: str) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class SinkContext:
    """What a sink may know of the run it copies."""

    folder: Path
    """The run folder; a sink keeps files of its own below it."""
    name: str
    config: Mapping[str, Any]
    """The whole configuration as a tree."""
    resume_step: int
    """The step this run goes on from; 0 for a fresh one."""
    life: int = 1
    """Number of this life of the run."""
    lineage: Mapping[str, Any] = field(default_factory=dict)
    """What made this life (`ecdit_train.lineage`)."""


class Sinks:
    """All sinks as one; without any, every call does nothing (that is what ranks other than 0 have).

    `truth` is ours; a copy that raises is named once and left out from then on.
    """

    def __init__(
        self,
        truth: Journal | None = None,
        copies: Mapping[str, Sink] | None = None,
        *,
        folder: Path | None = None,
        limits: AlertsConfig | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """`folder`: of the run that is watched for alerts, by these `limits`; `say` tells a person of one."""
        self._truth = truth
        self._copies = dict(copies or {})
        self._folder, self._say = folder, say
        self._watch = Watch(limits) if folder is not None and limits is not None else None
        self._room = Room(folder) if folder is not None else None

    def log(self, step: int, record: Record) -> None:
        if self._truth is not None:
            self._truth.log(step, record)
        self._each(lambda sink: sink.log(step, record))
        if self._watch is not None:
            self._tell(self._watch.see(step, record, free_saves=self._room.saves() if self._room else None))

    def event(self, name: str, step: int, words: str) -> None:
        """Something that happened between two records (`observe.alerts.KINDS`)."""
        if self._watch is not None:
            self._tell(self._watch.event(name, step, words))

    def begins(self, step: int) -> None:
        """A life begins."""
        if self._watch is not None and self._folder is not None:
            began = [float(life.facts.get("began") or 0) for life in lives.read(self._folder)]
            self._tell(self._watch.begins([*began, time.time()], now=time.time(), step=step))

    def _tell(self, alerts: Iterable[Alert]) -> None:
        for alert in alerts:
            facts: dict[str, Any] = {"step": alert.step, "name": alert.name, "level": alert.level}
            facts |= {"state": "off" if alert.over else "on", "words": alert.words}
            assert self._folder is not None
            if self._truth is None or self._truth.ours():
                alert_file.append(self._folder, life=self._truth.life if self._truth is not None else 0, **facts)
            self._say(f"alert: {alert}")
            self._each(lambda sink, alert=alert: getattr(sink, "alert", _nothing)(alert))  # type: ignore[misc]

    def rewind(self, step: int) -> None:
        """The run goes on from an earlier step: later records are of a past that is not the run's."""
        if self._truth is not None:
            self._truth.go_back(step)
        self._each(lambda sink: getattr(sink, "rewind", _nothing)(step))

    def committed(self, step: int) -> None:
        """The run will not go back behind this step, unless its disk loses the checkpoint."""
        self._each(lambda sink: getattr(sink, "committed", _nothing)(step))

    def image(self, path: Path, *, key: str, step: int, caption: str) -> None:
        """A PNG that lies in the run folder."""
        self._each(lambda sink: sink.images(path, key, step, caption))

    def close(self) -> None:
        if self._truth is not None:
            self._truth.close()
        self._each(lambda sink: sink.close())

    def _each(self, call: Callable[[Sink], None]) -> None:
        for name, sink in list(self._copies.items()):
            try:
                call(sink)
            except Exception as error:
                del self._copies[name]
                off(name, error)


def _nothing(_: object) -> None:
    """What a sink does that has no such method."""


def off(name: str, error: Exception) -> None:
    """One line about a sink that failed."""
    logger.warning("sink %s is off for this run: %s", name, f"{type(error).__name__}: {redact_text(str(error))}")


class Once:
    """Warnings of a sink: one line for each kind of trouble, without secrets."""

    def __init__(self) -> None:
        self._kinds: set[str] = set()

    def warn(self, message: str, *, kind: str) -> None:
        if kind not in self._kinds:
            self._kinds.add(kind)
            logger.warning("%s", redact_text(" ".join(message.split())))


def open_sinks(
    run: SinkContext,
    sinks: Mapping[str, SinkConfig],
    *,
    rank: int,
    limits: AlertsConfig | None = None,
    life: int = 1,
    still_ours: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = lambda text: None,
) -> Sinks:
    """Rank 0 gets the journal of this life and every configured sink that opens; other ranks a null object. Without
    `limits` nobody watches for alerts."""
    if rank != 0:
        return Sinks()
    truth = Journal(run.folder, life=life, after=run.resume_step, still_ours=still_ours)
    copies: dict[str, Sink] = {}
    for name, sink in sinks.items():
        try:
            copies[name] = sink.open(run)
        except Exception as error:
            off(name, error)
    opened = Sinks(truth, copies, folder=run.folder, limits=limits, say=say)
    opened.begins(run.resume_step)
    return opened

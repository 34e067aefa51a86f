"""A copy of the records for TensorBoard, in `<run>/tensorboard`. The only importer of tensorboard, which is an extra.

As with W&B every call happens in one daemon thread behind a bounded queue. Rows go at once: TensorBoard can take them back, as a
new file says from which step on what older files have does not count (`purge_step`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import math
import queue
import struct
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ecdit_train.config.slots import SinkConfig

from .redact import redact, redact_text
from .sinks import Record, SinkContext

logger = logging.getLogger("ecdit.observe")

FOLDER = "tensorboard"
CLOSE_SECONDS = 5.0
QUEUE = 2048

Call = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class TensorBoard(SinkConfig):
    """TensorBoard files: `tensorboard --logdir runs` shows them."""

    flush_seconds: float
    """How often they are written."""

    def check(self, run: Any, check: Any, *, key: str) -> None:
        check.positive([f"{key}.flush_seconds"])
        rule = (
            "needs the package tensorboard, which is an extra: pip install 'ecdit[tensorboard]'; or observe/sinks=wandb"
        )
        check.require(importlib.util.find_spec("tensorboard") is not None, key, rule=rule, shown="TensorBoard")

    def open(self, run: SinkContext) -> TensorBoardSink:
        return TensorBoardSink(run, flush_seconds=self.flush_seconds)


class TensorBoardSink:
    """One event file for each life, and another after each roll-back."""

    def __init__(self, run: SinkContext, *, flush_seconds: float) -> None:
        self._folder, self._flush = run.folder / FOLDER, flush_seconds
        self._writer: Any = None
        self._trouble: set[str] = set()
        self._queue: queue.Queue[Call | None] | None = queue.Queue(maxsize=QUEUE)
        self._thread = threading.Thread(target=self._work, args=(self._queue,), name="tensorboard-sink", daemon=True)
        self._thread.start()
        config = dict(run.config)
        self._put(lambda: self._begin(run.resume_step, config))

    def log(self, step: int, record: Record) -> None:
        values = {name: value for name, value in record.items() if isinstance(value, int | float)}
        self._put(lambda: self._scalars(step, values, at=time.time()))

    def images(self, path: Path, key: str, step: int, caption: str) -> None:
        self._put(lambda: self._image(path, key, step))

    def rewind(self, step: int) -> None:
        self._put(lambda: self._begin(step))

    def alert(self, alert: Any) -> None:
        text = redact_text(str(alert))
        self._put(lambda: self._writer.add_text("alerts", text, alert.step))

    def close(self) -> None:
        if self._queue is None:
            return
        work, self._queue = self._queue, None
        deadline = time.monotonic() + CLOSE_SECONDS
        with contextlib.suppress(queue.Full):
            work.put(None, timeout=CLOSE_SECONDS)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._warn(f"TensorBoard's files were not written within {CLOSE_SECONDS:g} s; metrics.jsonl is complete")

    def _put(self, call: Call) -> None:
        if self._queue is not None:
            try:
                self._queue.put_nowait(call)
            except queue.Full:
                self._warn("TensorBoard is behind, records are left out there; metrics.jsonl has them")

    def _work(self, work: queue.Queue[Call | None]) -> None:
        while (call := work.get()) is not None:
            self._guard(call)
        if self._writer is not None:
            self._guard(self._writer.close)

    def _guard(self, call: Call) -> None:
        try:
            call()
        except Exception as error:
            self._warn(f"TensorBoard: {type(error).__name__}: {error}; metrics.jsonl has everything")

    def _warn(self, message: str) -> None:
        kind = message.partition(":")[0]  # once for each kind of trouble; of errors, the first
        if kind not in self._trouble:
            self._trouble.add(kind)
            logger.warning("%s", redact_text(" ".join(message.split())))

    def _begin(self, after: int, config: Mapping[str, Any] | None = None) -> None:
        """A new file: what older ones have of steps after `after` does not count."""
        from torch.utils.tensorboard import SummaryWriter

        if self._writer is not None:
            self._writer.close()
        self._writer = SummaryWriter(str(self._folder), purge_step=after + 1, flush_secs=max(1, int(self._flush)))
        if config is not None:
            text = json.dumps(redact(config), indent=2, default=str)
            self._writer.add_text("config", "".join(f"    {line}\n" for line in text.splitlines()), after)

    def _scalars(self, step: int, values: Mapping[str, float], *, at: float) -> None:
        for name, value in values.items():
            if math.isfinite(value):  # its charts break at others, and show nothing
                self._writer.add_scalar(name, value, step, walltime=at)

    def _image(self, path: Path, key: str, step: int) -> None:
        """The PNG as it lies there, not decoded."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        data = path.read_bytes()
        width, height = struct.unpack(">II", data[16:24])
        picture = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=data)
        self._writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=key, image=picture)]), step)

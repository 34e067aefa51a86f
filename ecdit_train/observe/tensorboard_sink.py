"""A copy of the records for TensorBoard, in `<run>/tensorboard`. The only importer of tensorboard, which is an extra.

As with W&B every call is made by a `CallQueue`. Rows go at once: TensorBoard can take them back, as a
new file says from which step on what older files have does not count (`purge_step`).
"""

from __future__ import annotations

import importlib.util
import json
import math
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ecdit_train.config.slots import SinkConfig

from .call_queue import CallQueue
from .redact import redact, redact_text
from .sinks import Once, Record, SinkContext

FOLDER = "tensorboard"
CLOSE_SECONDS = 5.0
QUEUE = 2048


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
        self._once = Once()
        self._queue = CallQueue(
            "tensorboard-sink",
            open=partial(_Files, run.folder / FOLDER, flush_seconds=flush_seconds),
            shut=_Files.close,
            fails=self._failed,
            size=QUEUE,
            holes=True,
        )
        self._queue.start()
        config = dict(run.config)
        self._put(lambda files: files.begin(run.resume_step, config))

    def log(self, step: int, record: Record) -> None:
        values = {name: value for name, value in record.items() if isinstance(value, int | float)}
        at = time.time()
        self._put(lambda files: files.scalars(step, values, at=at))

    def images(self, path: Path, key: str, step: int, caption: str) -> None:
        self._put(lambda files: files.image(path, key, step))

    def rewind(self, step: int) -> None:
        self._put(lambda files: files.begin(step))

    def alert(self, alert: Any) -> None:
        text = redact_text(str(alert))
        self._put(lambda files: files.text("alerts", text, alert.step))

    def close(self) -> None:
        if not self._queue.close(within=CLOSE_SECONDS):
            self._warn(f"TensorBoard's files were not written within {CLOSE_SECONDS:g} s; metrics.jsonl is complete")

    def _put(self, call: Callable[[_Files], None]) -> None:
        if not self._queue.put(call):
            self._warn("TensorBoard is behind, records are left out there; metrics.jsonl has them")

    def _failed(self, error: BaseException) -> None:
        self._warn(f"TensorBoard: {type(error).__name__}: {error}; metrics.jsonl has everything")

    def _warn(self, message: str) -> None:
        self._once.warn(message, kind=message.partition(":")[0])  # of errors, the first


class _Files:
    """What TensorBoard reads, in the queue's thread."""

    def __init__(self, folder: Path, *, flush_seconds: float) -> None:
        self._folder, self._flush = folder, flush_seconds
        self._writer: Any = None

    def begin(self, after: int, config: Mapping[str, Any] | None = None) -> None:
        """A new file: what older ones have of steps after `after` does not count."""
        from torch.utils.tensorboard import SummaryWriter

        self.close()
        self._writer = SummaryWriter(str(self._folder), purge_step=after + 1, flush_secs=max(1, int(self._flush)))
        if config is not None:
            text = json.dumps(redact(config), indent=2, default=str)
            self.text("config", "".join(f"    {line}\n" for line in text.splitlines()), after)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def text(self, name: str, words: str, step: int) -> None:
        self._writer.add_text(name, words, step)

    def scalars(self, step: int, values: Mapping[str, float], *, at: float) -> None:
        for name, value in values.items():
            if math.isfinite(value):  # its charts break at others, and show nothing
                self._writer.add_scalar(name, value, step, walltime=at)

    def image(self, path: Path, key: str, step: int) -> None:
        """The PNG as it lies there, not decoded."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        data = path.read_bytes()
        width, height = struct.unpack(">II", data[16:24])
        picture = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=data)
        self._writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=key, image=picture)]), step)

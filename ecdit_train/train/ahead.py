"""The batch of the next step, fetched and encoded while the device works on this one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ecdit_train.diffusion.microbatch import Microbatch, Place
from ecdit_train.supervise.beats import Heart

from .contracts import Batches


@dataclass(frozen=True, kw_only=True)
class Taken:
    """A batch to train on, and where in the data the run is once it has."""

    batch: Microbatch
    place: Place


class Ahead:
    """One batch ahead of the training. On CUDA its copies and the frozen encoders run on a stream of their own, beside the step.

    What was fetched ahead is nobody's yet: state, counts and errors belong to the step that takes the batch. With the
    batch of the step whose numbers nobody has read yet, three are in memory (plan/prepared.py).
    """

    def __init__(
        self,
        batches: Batches,
        *,
        device: torch.device,
        heart: Callable[[], Heart],
        waiting: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """`heart`'s is told the phases `data` (with the step that the batch is for) and `encode`; `waiting` is around the
        wait for the loader."""
        self._batches, self._heart, self._waiting = batches, heart, waiting
        self._next: Taken | Exception | None = None
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ready: torch.cuda.Event | None = None

    def prepare(self, step: int) -> None:
        """Have the batch of `step` under way. Raises nothing: an error is raised to the one who takes the batch."""
        if self._next is not None:
            return
        try:
            self._heart().enter("data", step=step)
            with self._waiting():
                raw = self._batches.fetch()
            self._heart().enter("encode")
            with nullcontext() if self._side is None else torch.cuda.stream(self._side):
                batch = self._batches.encode(raw)
            self._next = Taken(batch=batch, place=self._batches.place())
            if self._side is not None:
                self._ready = self._side.record_event()
        except Exception as error:
            self._next = error

    def take(self, step: int) -> Taken:
        """The batch of `step`. On CUDA the step's stream waits for it, the host does not."""
        self.prepare(step)
        taken, self._next = self._next, None
        assert taken is not None
        if isinstance(taken, Exception):
            raise taken
        if self._ready is not None:
            stream = torch.cuda.current_stream()
            stream.wait_event(self._ready)
            for field in fields(taken.batch):
                if isinstance(tensor := getattr(taken.batch, field.name), Tensor) and tensor.is_cuda:
                    tensor.record_stream(stream)  # its memory is the side stream's to give again
        return taken

"""Calls made in a thread of their own: a service that hangs, raises or lags costs nothing where they are asked for.

Who asks puts a call into a bounded queue and goes on. One daemon thread makes them, in order, so what it calls upon need not
know of threads. A full queue leaves calls out, an exception is told, and closing takes no longer than it is given.
"""

from __future__ import annotations

import contextlib
import functools
import queue
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class CallQueue(Generic[T]):
    """Calls upon a `T`, which only the thread sees."""

    def __init__(
        self,
        name: str,
        *,
        open: Callable[[], T | None],
        shut: Callable[[T], object],
        fails: Callable[[BaseException], None],
        size: int,
        holes: bool,
    ) -> None:
        """In the thread, called `name`: `open` makes what is called upon (None, or an exception: nothing is, and calls are thrown
        away), `shut` comes after the last call, and `fails` is told what they raise, SystemExit as well. `size`: calls that
        may wait; `holes`: whether some are taken again after one was left out."""
        self.lost = 0
        """Calls that were left out."""
        self.closed = False
        self.abandoned = False
        """Closed, and nobody waits for the thread any more."""
        self._open, self._shut, self._fails, self._holes = open, shut, fails, holes
        self._queue: queue.Queue[Callable[[T], object] | None] = queue.Queue(maxsize=size)
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, call: Callable[[T], object]) -> bool:
        """False where it is left out, for want of room. Never waits; nothing happens after `close`."""
        if self.closed:
            return True
        if self._holes or not self.lost:
            with contextlib.suppress(queue.Full):
                self._queue.put_nowait(call)
                return True
        self.lost += 1
        return False

    def empty(self) -> bool:
        """Whether no call waits; the last may be under way."""
        return self._queue.empty()

    def close(self, *, within: float) -> bool:
        """Whether all that waited was called, and `shut`, within so many seconds. A second time it does nothing."""
        if self.closed:
            return not self.abandoned
        self.closed, deadline = True, time.monotonic() + within
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=max(0.0, within))
        self._thread.join(max(0.0, deadline - time.monotonic()))
        self.abandoned = self._thread.is_alive()
        return not self.abandoned

    def _work(self) -> None:
        made = self._guard(self._open)
        if made is None:
            while not self.abandoned and self._queue.get() is not None:
                pass
            return
        while (call := self._queue.get()) is not None:
            self._guard(functools.partial(call, made))
        self._guard(functools.partial(self._shut, made))

    def _guard(self, call: Callable[[], R]) -> R | None:
        try:
            return call()
        except BaseException as error:  # some clients raise SystemExit and KeyboardInterrupt
            self._fails(error)
            return None

"""An event loop in a thread of its own: hundreds of requests wait there, not in hundreds of threads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class Background:
    """Starts at once; a daemon, so a process that forgets `close` still ends."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._lock, self._closed = threading.Lock(), False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Start it there. Its result may be waited for in any other thread: CancelledError where `close` came first."""
        with self._lock:
            if not self._closed:
                return asyncio.run_coroutine_threadsafe(work, self._loop)
        work.close()
        never: Future[T] = Future()
        never.cancel()
        return never

    def soon(self, call: Callable[[], object]) -> None:
        """Call it there. Nothing happens after `close`."""
        try:
            self._loop.call_soon_threadsafe(call)
        except RuntimeError:  # closed
            return

    def close(self, *, seconds: float = 1.0) -> None:
        """Cancel all that is under way; the thread has ended when this returns, or after so many seconds will by itself."""
        with self._lock:  # what was submitted before is cancelled, what comes later is never started
            self._closed = True
        if self._thread.is_alive():
            self.soon(self._cancel)
            self._thread.join(seconds)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()

    def _cancel(self) -> None:
        async def end() -> None:
            others = asyncio.all_tasks(self._loop) - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            self._loop.stop()

        self._ending = self._loop.create_task(end())

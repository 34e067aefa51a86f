"""Tasks in processes of this machine."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

from data_pipeline.errors import DataError
from data_pipeline.preparing.work import Record, Service, Task, Work, run_task

MAX_DEATHS = 3
"""Of processes that had the same task in hand."""


class Runner(Protocol):
    """Runs tasks somewhere."""

    def run(self, work: Work, tasks: Iterable[Task]) -> Iterator[tuple[Task, Record]]:
        """Each task with its record, in the order in which they are finished. A task is asked for when there is room for it."""
        ...


class Local:
    """One process a task. With one worker it is this one."""

    def __init__(self, *, workers: int = 1) -> None:
        self._workers = workers

    def run(self, work: Work, tasks: Iterable[Task]) -> Iterator[tuple[Task, Record]]:
        """Raises DataError where `MAX_DEATHS` processes died with the same task in hand; whatever a task raises."""
        if self._workers == 1:
            with _service(work, number=0) as service:
                for task in tasks:
                    yield task, run_task(work, task, service=service)
            return
        queue, deaths = iter(tasks), dict[int, int]()
        again: list[Task] = []
        while True:
            lost: list[Task] = []
            # spawn, not fork: the caller may hold threads (torch, a loader) that do not survive a fork
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(
                self._workers, mp_context=context, initializer=_begin, initargs=(work, context.Value("i", 0))
            ) as pool:
                yield from self._drain(pool, again=again, queue=queue, lost=lost)
            if not lost:
                return
            for task in lost:
                deaths[task.number] = deaths.get(task.number, 0) + 1
            dead = [task.output.name for task in lost if deaths[task.number] >= MAX_DEATHS]
            if dead:
                raise DataError(
                    f"{', '.join(dead)}: {MAX_DEATHS} processes died at it (of memory?); take fewer workers"
                )
            again = lost

    def _drain(
        self, pool: ProcessPoolExecutor, *, again: list[Task], queue: Iterator[Task], lost: list[Task]
    ) -> Iterator[tuple[Task, Record]]:
        """Until there are no tasks, or the pool broke: then `lost` are those that were in hand."""
        flying: dict[Future[Record], Task] = {}
        while True:
            while len(flying) < self._workers and not lost:
                task = again.pop() if again else next(queue, None)
                if task is None:
                    break
                try:
                    flying[pool.submit(_run, task)] = task
                except BrokenProcessPool:
                    lost.append(task)
            if not flying:
                lost += again
                return
            for future in wait(flying, return_when=FIRST_COMPLETED).done:
                task = flying.pop(future)
                try:
                    record = future.result()
                except BrokenProcessPool:
                    lost.append(task)
                    continue
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
                yield task, record


@contextmanager
def _service(work: Work, *, number: int) -> Iterator[Service | None]:
    """In one thread beside the caller, which prepares the next batch meanwhile."""
    if work.service is None:
        yield None
        return
    call = work.service(number)
    with ThreadPoolExecutor(1, thread_name_prefix="service") as thread:
        yield lambda batch: thread.submit(call, batch)


_WORK: Work | None = None
_NUMBER = 0
_HELD = ExitStack()
_SERVICE: Service | None = None


def _begin(work: Work, started: Any) -> None:
    """Of a worker. It dies with its parent: a killed command would leave processes behind that wait for ever."""
    global _WORK, _NUMBER
    with started.get_lock():
        _WORK, _NUMBER = work, started.value
        started.value += 1
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, name="parent", daemon=True).start()


def _run(task: Task) -> Record:
    global _SERVICE
    assert _WORK is not None
    if _SERVICE is None:
        _SERVICE = _HELD.enter_context(_service(_WORK, number=_NUMBER))
    return run_task(_WORK, task, service=_SERVICE)

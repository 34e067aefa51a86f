"""Tasks on a Ray cluster: actors that hold the work, one task in hand each; a service (encoders) has actors of its own.

An actor that dies is replaced and its task is made anew; what it left half made is a temporary file that nobody reads. No
more tasks are given out than there are actors, and a worker has `IN_FLIGHT` batches with the encoders at most: what decodes
faster than it is encoded waits.
"""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.preparing.work import Record, Task, Work, run_task

RETRIES = 3
"""Of a task, or a batch, whose actor died."""
IN_FLIGHT = 2
"""Batches that one worker has with the encoders."""

logger = logging.getLogger("ecdit.data")


class OnRay:
    """Args:
    workers: actors that make tasks, of one CPU each.
    encoders: actors that hold the service, for work that has one.
    encoder_gpus: of each, may be a fraction; None: one each where the cluster has GPUs.
    address: of a cluster; None starts Ray on this machine, or joins what RAY_ADDRESS names.
    """

    def __init__(
        self, *, workers: int = 1, encoders: int = 1, encoder_gpus: float | None = None, address: str | None = None
    ) -> None:
        self._workers, self._encoders, self._gpus, self._address = workers, encoders, encoder_gpus, address

    def run(self, work: Work, tasks: Iterable[Task]) -> Iterator[tuple[Task, Record]]:
        """Raises DataError where too many actors died with the same task in hand; whatever a task raises."""
        ray = _ray()
        began = not ray.is_initialized()
        if began:
            ray.init(address=self._address, include_dashboard=False, log_to_driver=False, logging_level="warning")
        encoders: list[Any] = []
        workers: list[Any] = []
        gpus = 0.0
        try:
            if work.service is not None:
                gpus = self._gpus if self._gpus is not None else float(ray.cluster_resources().get("GPU", 0) > 0)
                kind = ray.remote(num_cpus=0 if gpus else 1, num_gpus=gpus, max_restarts=-1, max_task_retries=RETRIES)(
                    _Encoder
                )
                encoders = [kind.remote(work.service, number) for number in range(self._encoders)]
            kind = ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=RETRIES)(_Worker)
            shared = ray.put(work)
            room = self._room(ray, encoders=len(encoders), on_cpus=bool(encoders) and not gpus)
            workers = [kind.remote(shared, encoders, number) for number in range(room)]
            yield from _drain(ray, workers, iter(tasks))
        finally:
            for actor in [*workers, *encoders]:
                ray.kill(actor)
            if began:
                ray.shutdown()

    def _room(self, ray: Any, *, encoders: int, on_cpus: bool) -> int:
        """Workers that the cluster has CPUs for: an actor without one would hold its task for ever, without a word."""
        cpus = int(ray.cluster_resources().get("CPU", 0)) - (encoders if on_cpus else 0)
        if cpus < 1:
            rule = f"must leave a CPU of {int(ray.cluster_resources().get('CPU', 0))} for a worker"
            raise DataError(f"actors = {encoders}: {rule}; nearest: {max(1, encoders + cpus - 1)}")
        if cpus < self._workers:
            logger.warning("Ray has CPUs for %d of %d workers", cpus, self._workers)
        return min(self._workers, cpus)


def _drain(ray: Any, workers: list[Any], queue: Iterator[Task]) -> Iterator[tuple[Task, Record]]:
    idle, flying = deque(workers), dict[Any, tuple[Any, Task]]()
    while True:
        while idle and (task := next(queue, None)) is not None:
            worker = idle.popleft()
            flying[worker.run.remote(task)] = (worker, task)
        if not flying:
            return
        ready, _ = ray.wait(list(flying), num_returns=1)
        for reference in ready:
            worker, task = flying.pop(reference)
            try:
                record = ray.get(reference)
            except ray.exceptions.RayActorError as error:
                raise DataError(
                    f"{task.output.name}: {RETRIES + 1} Ray actors died at it (of memory?): {error}"
                ) from error
            except ray.exceptions.RayTaskError as error:
                raise (error.cause if isinstance(error.cause, DataError) else error) from None
            idle.append(worker)
            yield task, record


class _Worker:
    """Decodes and writes; what is to be encoded it hands to the encoders in turn."""

    def __init__(self, work: Work, encoders: list[Any], number: int) -> None:
        self._work, self._service = work, _Remote(encoders, first=number) if encoders else None

    def run(self, task: Task) -> Record:
        return run_task(self._work, task, service=self._service)


class _Encoder:
    """Holds the service."""

    def __init__(self, make: Any, number: int) -> None:
        self._service = make(number)

    def call(self, batch: Any) -> Any:
        return self._service(batch)


class _Remote:
    """A service that is somewhere else. Its answers are promises, and no more than `IN_FLIGHT` are open."""

    def __init__(self, encoders: list[Any], *, first: int) -> None:
        self._turn, self._open = itertools.cycle(encoders[first % len(encoders) :] + encoders), deque[Any]()

    def __call__(self, batch: Any) -> Any:
        ray = _ray()
        while len(self._open) >= IN_FLIGHT:
            ray.wait([self._open.popleft()])
        reference = next(self._turn).call.remote(batch)
        self._open.append(reference)
        return _Promise(reference)


class _Promise:
    def __init__(self, reference: Any) -> None:
        self._reference = reference

    def result(self) -> Any:
        return _ray().get(self._reference)


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise DataError("runner=ray needs Ray: pip install 'ecdit[ray]'") from error
    return ray

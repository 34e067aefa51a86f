"""Calls in a thread of their own: in order, and nothing that goes wrong there reaches or delays the caller."""

from __future__ import annotations

import threading
import time

import pytest

from ecdit_train.observe.call_queue import CallQueue

SOON = 5.0
"""Seconds in which a thread that may go on has ended, on a machine that does other things besides."""


class Service:
    """Keeps what it was called with, and where."""

    def __init__(self) -> None:
        self.seen: list[object] = []
        self.threads: set[str] = set()
        self.errors: list[BaseException] = []

    def take(self, value: object) -> None:
        self.threads.add(threading.current_thread().name)
        self.seen.append(value)

    def queue(self, *, size: int = 100, holes: bool = False, open=None, shut=None) -> CallQueue[Service]:
        made = CallQueue(
            "service",
            open=open or (lambda: self),
            shut=shut or (lambda service: service.take("shut")),
            fails=self.errors.append,
            size=size,
            holes=holes,
        )
        made.start()
        return made


@pytest.fixture
def service():
    return Service()


@pytest.fixture
def gate():
    """What hangs waits for it; open at the end of a test, so that no thread is left."""
    event = threading.Event()
    yield event
    event.set()


def raising(error: BaseException):
    def call(*_: object) -> None:
        raise error

    return call


def test_calls_are_made_in_order_in_one_thread_and_the_end_comes_last(service):
    calls = service.queue()
    for n in range(50):
        assert calls.put(lambda service, n=n: service.take(n))
    assert calls.close(within=SOON)
    assert service.seen == [*range(50), "shut"]
    assert service.threads == {"service"}
    assert calls.empty()
    assert not service.errors


@pytest.mark.parametrize("error", [RuntimeError("no"), SystemExit(3), KeyboardInterrupt()])
def test_what_a_call_raises_is_told_and_the_next_one_is_made(service, error):
    calls = service.queue(shut=raising(error))
    assert calls.put(raising(error))
    assert calls.put(lambda service: service.take(1))
    assert calls.close(within=SOON)
    assert service.seen == [1]
    assert service.errors == [error, error], "of the call and of the end"


@pytest.mark.parametrize("open", [lambda: None, raising(OSError("nobody there"))])
def test_where_nothing_opens_calls_are_thrown_away(service, open):
    calls = service.queue(size=2, open=open)
    until = time.monotonic() + SOON
    for _ in range(20):
        assert calls.put(lambda service: service.take(1))
        while not calls.empty() and time.monotonic() < until:
            time.sleep(0.001)
    assert calls.close(within=SOON)
    assert not service.seen
    assert not calls.lost
    assert len(service.errors) <= 1


@pytest.mark.parametrize("where", ["open", "call", "shut"])
def test_who_hangs_is_left_behind(service, gate, where):
    wait = {"open": lambda: gate.wait() and None, "shut": lambda service: gate.wait()}
    calls = service.queue(**{where: wait[where]} if where in wait else {})
    began = time.monotonic()
    calls.put((lambda service: gate.wait()) if where == "call" else (lambda service: service.take(1)))
    assert not calls.close(within=0.2)
    assert 0.1 < time.monotonic() - began < SOON
    assert calls.abandoned
    assert not calls.close(within=SOON), "the second time it is known"
    gate.set()
    calls._thread.join(SOON)
    assert not calls._thread.is_alive()


def test_a_hang_before_a_full_queue_ends_in_time_and_lets_the_thread_end(service, gate):
    """There is no room for the word that ends it."""
    calls = service.queue(size=1, open=lambda: gate.wait() and None)
    assert calls.put(lambda service: service.take(1))
    assert not calls.put(lambda service: service.take(2))
    assert not calls.close(within=0.1)
    gate.set()
    calls._thread.join(SOON)
    assert not calls._thread.is_alive()
    assert not service.seen


def test_closed_twice_it_ends_once_and_takes_nothing_more(service):
    calls = service.queue()
    assert not calls.closed
    assert calls.close(within=SOON)
    assert calls.close(within=SOON)
    assert calls.closed
    assert not calls.abandoned
    assert calls.put(lambda service: service.take(1))
    assert calls.empty()
    assert service.seen == ["shut"]
    assert not calls.lost


@pytest.mark.parametrize(("holes", "expected", "lost"), [(False, [0, 1], 3), (True, [0, 1, 4], 2)])
def test_a_full_queue_leaves_calls_out_and_never_waits(service, gate, holes, expected, lost):
    calls, busy = service.queue(size=2, holes=holes), threading.Event()
    calls.put(lambda service: busy.set() or gate.wait())
    assert busy.wait(SOON)
    began = time.monotonic()
    taken = [calls.put(lambda service, n=n: service.take(n)) for n in range(4)]
    assert time.monotonic() - began < 0.5
    assert taken == [True, True, False, False]
    gate.set()
    until = time.monotonic() + SOON
    while not calls.empty() and time.monotonic() < until:
        time.sleep(0.001)
    assert calls.put(lambda service: service.take(4)) is holes
    assert calls.close(within=SOON)
    assert service.seen == [*expected, "shut"]
    assert calls.lost == lost

"""Where the time goes: phases add up to what passed, on the host's clock and on a device that works behind it."""

from __future__ import annotations

import pytest
import torch

from ecdit_train.observe import phases
from ecdit_train.observe.goodput import Useful
from ecdit_train.observe.phases import PhaseClock
from ecdit_train.parallel import stopwatch
from ecdit_train.parallel.stopwatch import Stopwatch


class Clock:
    """The host's, as `time` in a module that reads it."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


def test_phases_add_up_to_the_time_that_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Clock()
    monkeypatch.setattr(phases, "time", host)
    clock = PhaseClock(torch.device("cpu"))
    for phase, seconds in (("data", 1.0), ("forward", 4.0), ("data", 0.5)):
        clock.enter(phase)
        host.now += seconds
    assert clock.read() == {"data": 1.5, "forward": 4.0}
    host.now += 2.0
    assert clock.read() == {"data": 2.0}, "the open phase goes on"


class Device:
    """A stream that works through its events when told to; asking a border that it has not reached is an error."""

    def __init__(self) -> None:
        self.now, self.given = 0.0, 0.0
        self.made = 0

    def event(self, *, enable_timing: bool) -> Event:
        assert enable_timing
        self.made += 1
        return Event(self)


class Event:
    def __init__(self, device: Device) -> None:
        self.device, self.at = device, -1.0

    def record(self) -> None:
        self.at = self.device.given

    def query(self) -> bool:
        return self.at <= self.device.now

    def synchronize(self) -> None:
        assert self.query(), "this waits for the device"

    def elapsed_time(self, other: Event) -> float:
        assert self.query()
        assert other.query()
        return 1e3 * (other.at - self.at)


def test_borders_on_a_device_are_read_once_it_has_passed_them(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    monkeypatch.setattr(phases, "MANY", 8)
    clock = PhaseClock(torch.device("cuda"))
    for _ in range(10):  # the host runs ahead; nothing may wait
        for phase, work in (("forward", 1.0), ("backward", 2.0)):
            clock.enter(phase)
            device.given += work
        device.now = max(0.0, device.given - 12.0)  # four steps behind
    assert device.made < 20, "events are used again"
    device.now = device.given
    assert clock.read() == {"forward": 10.0, "backward": 20.0}
    device.given += 5.0
    device.now = device.given
    assert clock.read() == {"backward": 5.0}


def test_a_watch_tells_what_the_device_has_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    monkeypatch.setattr(stopwatch, "MANY", 8)
    watch = Stopwatch("cuda")
    for _ in range(40):
        device.given += 1.0  # other work
        with watch:
            device.given += 2.0
        device.now = max(0.0, device.given - 12.0)
    assert device.made < 40, "events are used again"
    assert watch.read() == 2.0 * 36  # the last four are still on their way
    device.now = device.given
    assert watch.read() == 2.0 * 4
    assert watch.read() == 0.0


def test_a_watch_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Clock()
    monkeypatch.setattr(stopwatch, "time", host)
    watch = Stopwatch("cpu")
    for _ in range(2):
        with watch:
            host.now += 2.0
        host.now += 1.0
    assert watch.read() == 4.0
    assert watch.read() == 0.0


def test_goodput_takes_back_what_was_rolled_back() -> None:
    useful = Useful(first=100)
    useful.add(110, 1.0)
    assert useful.share(20.0) == 0.5
    useful.add(120, 2.0)
    assert useful.share(60.0) == 0.5
    useful.rewind(115)
    assert useful.share(20.0) == 0.5
    useful.add(120, 0.5)
    assert useful.share(20.0) == 0.75
    assert useful.share(0.0) == 0.0

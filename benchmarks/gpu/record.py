"""What the checks found: written after each of them, so that nothing that comes later can lose it."""

from __future__ import annotations

import contextlib
import datetime
import json
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ecdit_train import atomic

from ..timing import Bar
from .device import Device


class Skipped(Exception):  # noqa: N818 - it is no error
    """There is nothing to check here; says why."""


@dataclass(kw_only=True)
class Findings:
    """What a check says as it goes: all of it is kept, also where the check fails later."""

    values: dict[str, Any] = field(default_factory=dict)
    bars: list[Bar] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    """Parts that could not be checked, and why."""
    failed: dict[str, str] = field(default_factory=dict)
    """Parts that ended with an exception: its traceback."""

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Around one of several things that a check does: what goes wrong there does not keep the others from being done."""
        try:
            yield
        except Skipped as why:
            self.skipped[name] = str(why)
        except Exception:
            self.failed[name] = traceback.format_exc()

    def at_most(self, name: str, value: float, limit: float) -> None:
        self.bars.append(Bar(name=name, value=float(value), limit=limit, at_least=False))

    def at_least(self, name: str, value: float, limit: float) -> None:
        self.bars.append(Bar(name=name, value=float(value), limit=limit, at_least=True))


Check = Callable[[Device, Findings], None]


def perform(check: Check, device: Device) -> dict[str, Any]:
    """The check's outcome as plain values: `status` is ran, skipped or failed."""
    found, began, status, reason = Findings(), time.perf_counter(), "ran", ""
    try:
        check(device, found)
    except Skipped as why:
        status, reason = "skipped", str(why)
    except Exception:
        status, reason = "failed", traceback.format_exc()
    if found.failed:
        status, reason = "failed", "\n".join(f"{name}: {trace}" for name, trace in found.failed.items()) + reason
    return {
        "status": status,
        "reason": reason,
        "seconds": round(time.perf_counter() - began, 1),
        "values": found.values,
        "skipped": found.skipped,
        "bars": [asdict(bar) | {"passed": bar.passed} for bar in found.bars],
    }


@dataclass(kw_only=True)
class Record:
    """The file of a day. A second run replaces the checks that it ran again and keeps the others."""

    path: Path
    checks: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, *, name: str) -> Record:
        path = folder / f"{datetime.datetime.now(datetime.UTC).date().isoformat()}-{name}.json"
        return cls(path=path, checks=json.loads(path.read_text())["checks"] if path.exists() else {})

    def keep(self, name: str, outcome: dict[str, Any]) -> None:
        self.checks[name] = outcome
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {"name": "gpu_check", "date": self.path.name[:10], "checks": self.checks}
        atomic.write(self.path, (json.dumps(content, indent=1) + "\n").encode())


def table(checks: dict[str, Any]) -> list[str]:
    """One line for each bar, and for each check that could not say more."""
    lines = []
    for name, outcome in checks.items():
        for bar in outcome["bars"]:
            word, sign = "pass" if bar["passed"] else "FAIL", ">=" if bar["at_least"] else "<="
            lines.append(f"{name:<8} {word}  {bar['name']:<72} {bar['value']:9.3g} {sign} {bar['limit']:.3g}")
        lines += [f"{name:<8} skip  {part}: {why}" for part, why in outcome["skipped"].items()]
        if outcome["status"] != "ran":
            last = (outcome["reason"].strip().splitlines() or [""])[-1]
            lines.append(f"{name:<8} {'skip' if outcome['status'] == 'skipped' else 'FAIL'}  {last}")
    return lines


def good(outcome: dict[str, Any]) -> bool:
    return outcome["status"] != "failed" and all(bar["passed"] for bar in outcome["bars"])

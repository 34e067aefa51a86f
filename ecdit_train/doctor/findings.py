"""Checks that may hang, fail or raise, and what they found. Each runs in a thread that nobody has to wait for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from ecdit_train.secrets import hide_forms

State = Literal["ok", "warning", "fail"]
ORDER: tuple[State, ...] = ("ok", "warning", "fail")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the table."""

    what: str
    state: State
    found: str
    fix: str = ""
    """What to do; empty where all is well."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One question. `ask` may return several findings, also under other names."""

    what: str
    ask: Callable[[], Iterable[Finding]]
    seconds: float = 20.0
    """After which it is held for hanging."""
    hangs: str = "what it asks does not answer; try it by hand"
    """What to do then."""


def ok(what: str, found: str) -> Finding:
    return Finding(what=what, state="ok", found=found)


def warning(what: str, found: str, fix: str) -> Finding:
    return Finding(what=what, state="warning", found=found, fix=fix)


def fail(what: str, found: str, fix: str) -> Finding:
    return Finding(what=what, state="fail", found=found, fix=fix)


def run(checks: Sequence[Check]) -> list[Finding]:
    """All at once, in their order. A check that raises or hangs is a warning of its own, and ends no other."""
    began = time.monotonic()
    asked = [(check, _Asked(check)) for check in checks]
    found: list[Finding] = []
    for check, answer in asked:
        answer.thread.join(max(0.0, began + check.seconds - time.monotonic()))
        found += answer.findings()
    return [_clean(finding) for finding in found]


class _Asked:
    """A check at work."""

    def __init__(self, check: Check) -> None:
        self._check = check
        self._found: list[Finding] | None = None
        self._error: BaseException | None = None
        self.thread = threading.Thread(target=self._work, name=f"doctor {check.what}", daemon=True)
        self.thread.start()

    def _work(self) -> None:
        try:
            self._found = list(self._check.ask())
        except BaseException as error:
            self._error = error

    def findings(self) -> list[Finding]:
        what = self._check.what
        if self._error is not None:
            said = f"could not be checked: {type(self._error).__name__}: {self._error}"
            return [warning(what, said, "look at it by hand; if this is a defect of ecdit, report it")]
        if self._found is None:
            return [warning(what, f"no answer within {self._check.seconds:g} s", self._check.hangs)]
        return self._found


def _clean(finding: Finding) -> Finding:
    """One line, and no secret that somebody put into an address."""
    found, fix = (hide_forms(" ".join(text.split())) for text in (finding.found, finding.fix))
    return Finding(what=finding.what, state=finding.state, found=found, fix=fix)


def worst(findings: Iterable[Finding]) -> State:
    return max((finding.state for finding in findings), key=ORDER.index, default="ok")

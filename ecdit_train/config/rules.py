"""Collects broken rules. A rule between sections is only asked once the numbers it divides by are sane."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ecdit_train.config.convert import flatten
from ecdit_train.config.schema import RunConfig
from ecdit_train.errors import Problem


class Checker:
    """The configuration, flat, and the problems found so far."""

    def __init__(self, cfg: RunConfig) -> None:
        self.values = flatten(cfg)
        self.problems: list[Problem] = []
        self._broken: set[str] = set()

    def require(self, ok: bool, field: str, *, rule: str, nearest: object | None = None, shown: Any = None) -> bool:
        """Notes a problem about `field` unless `ok`; `shown` replaces the printed value. Returns `ok`."""
        if not ok:
            value = self.values[field] if shown is None else shown
            self.problems.append(Problem(field=field, value=value, rule=rule, nearest=nearest))
            self._broken.add(field)
        return ok

    def at_least(self, least: int, fields: Iterable[str]) -> bool:
        """Each field is at least `least`, which is also its nearest valid value. Returns whether all are."""
        fine = True
        for field in fields:
            rule = f"must be at least {least}"
            fine &= self.require(self.values[field] >= least, field, rule=rule, nearest=least)
        return fine

    def positive(self, fields: Iterable[str]) -> bool:
        """Each (real) field is above 0. Returns whether all are."""
        fine = True
        for field in fields:
            fine &= self.require(self.values[field] > 0, field, rule="must be greater than 0")
        return fine

    def share(self, fields: Iterable[str], *, below_one: bool = False) -> bool:
        """Each field is in [0, 1], or in [0, 1) when 1 makes no sense. Returns whether all are."""
        fine = True
        for field in fields:
            value = self.values[field]
            ok = 0 <= value < 1 if below_one else 0 <= value <= 1
            rule = "must be at least 0 and below 1" if below_one else "must be between 0 and 1"
            nearest = 0.0 if value < 0 else (None if below_one else 1.0)
            fine &= self.require(ok, field, rule=rule, nearest=nearest)
        return fine

    def sane(self, *fields: str) -> bool:
        """Whether none of these fields has a problem yet."""
        return self._broken.isdisjoint(fields)


def is_whole(number: float) -> bool:
    """Whole up to floating-point noise (0.1 * 30 is 3)."""
    return abs(number - round(number)) < 1e-6


def short(number: float) -> str:
    """A number for a message: at most 6 digits, no trailing zeros."""
    return f"{number:.6g}"

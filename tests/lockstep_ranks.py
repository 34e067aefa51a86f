"""Ranks of a selection without processes: every rank's function is run again and again, each time one collective further."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _Missing(Exception):  # noqa: N818 - it is an event
    """A rank waits for the others."""

    def __init__(self, given: Tensor) -> None:
        self.given = given


class LockstepRank:
    """One rank of a `model.selecting.Ranks`. `sent`: bytes that it gave to each collective, in order."""

    def __init__(self, rank: int, size: int, answers: list[Tensor]) -> None:
        self.rank, self.size = rank, size
        self._answers, self._next = answers, 0
        self.sent: list[tuple[str, int]] = []

    def gather(self, x: Tensor) -> Tensor:
        return self._ask(x, "all_gather")

    def sum(self, x: Tensor) -> Tensor:
        return self._ask(x, "all_reduce").sum(0)

    def _ask(self, x: Tensor, kind: str) -> Tensor:
        self.sent.append((kind, x.numel() * x.element_size() * (self.size if kind == "all_gather" else 1)))
        if self._next == len(self._answers):
            raise _Missing(x)
        self._next += 1
        return self._answers[self._next - 1]


def in_lockstep(size: int, work: Callable[[LockstepRank], Any]) -> list[tuple[Any, LockstepRank]]:
    """What `work(rank)` returns on each of `size` ranks, with the rank; it must do the same when it is run again."""
    answers: list[Tensor] = []
    while True:
        given, done = [], []
        for r in range(size):
            rank = LockstepRank(r, size, answers)
            try:
                done.append((work(rank), rank))
            except _Missing as missing:
                given.append(missing.given)
        if not given:
            return done
        assert len(given) == size, "ranks issue different collectives"
        answers.append(torch.stack(given))

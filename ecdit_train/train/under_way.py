"""A step that the device was asked for, and what ranks agree on meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ecdit_train.errors import RunOwnedError
from ecdit_train.parallel.runtime import Runtime
from ecdit_train.supervise.ownership import Ownership

from .ahead import Taken
from .step import Issued
from .watching import Watched


@dataclass(frozen=True, kw_only=True)
class UnderWay:
    """A step whose numbers nobody has read."""

    step: int
    """Updates, this one included, if all were made."""
    taken: Taken
    issued: Issued
    lr: float
    watched: Watched


@dataclass(frozen=True, kw_only=True)
class Agreed:
    """The same on all ranks."""

    stopping: bool
    """Whether the run is to stop after this step."""
    writing: bool
    """Whether any rank still writes a save, as far as is known."""


def agree(
    step: int, *, every: int, known: bool, asked: bool, writing: bool, ownership: Ownership, runtime: Runtime
) -> Agreed:
    """Ranks ask each other every so many steps (`watch.agree_every`), on their hosts; one process need not ask.

    Args:
        known: whether the run is to stop here by a rule that all ranks know.
        asked: whether this rank was asked to stop.
        writing: whether this rank still writes.

    Raises:
        RunOwnedError: the run folder belongs to another job now.
    """
    if runtime.world > 1 and step % every != 0:
        return Agreed(stopping=known, writing=True)
    stops, writes, lost = runtime.any_rank(known or asked, writing, ownership.lost_to is not None)
    if lost:
        to = ownership.lost_to or "another job"
        raise RunOwnedError(f"the run was taken over by {to}: nothing more is written there")
    return Agreed(stopping=stops, writing=writes)


def tell_refused(steps: Sequence[UnderWay], say: Callable[[str], None]) -> None:
    """Of a rank that is about to leave with an error of its own: which steps were refused before it. Asks no other
    rank, which may be in the midst of something else."""
    for step in steps:
        numbers = step.issued.numbers()
        if not numbers.applied:
            say(f"step {step.step}: {numbers}: the update was not applied")

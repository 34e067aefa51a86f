"""What follows from the end of a life: a pure function."""

from __future__ import annotations

from dataclasses import dataclass

from ecdit_train.errors import EXIT_OK, EXIT_REQUEUE, NoProgressError
from launch import classes
from launch.job_file import Lives
from launch.record import History
from launch.slurm import JobState

DONE, STOP, AGAIN, REQUEUE, LEAVE = "done", "stop", "again", "requeue", "leave"
PREEMPTED = "PREEMPTED"
"""Among the warnings: what Slurm's SIGTERM to the steps was for."""


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a life ended, or why it did not begin."""

    code: int
    """Of the first process that failed; 0: all ended well."""
    why: str = ""
    """Its own words."""
    bad: tuple[tuple[str, str], ...] = ()
    """(node, what is wrong with it) of nodes that answer and must not be used."""
    lost: tuple[str, ...] = ()
    """Nodes that do not answer."""
    lived: bool = True
    """Whether ranks were started."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What happens next."""

    then: str
    """`done`, `stop`; `again`: another life in this allocation; `requeue`; `leave`: Slurm has decided already."""
    code: int
    """What the job returns, if this is its end here."""
    reason: str
    wait: float = 0.0
    """Seconds before it."""
    taken: bool = False
    """Whether Slurm took the nodes away (a preemption, a requeue by hand), which says nothing about the run."""


def decide(
    ending: Ending, *, past: History, limits: Lives, warned: tuple[str, ...], asked: bool, state: JobState | None
) -> Decision:
    """Args:
    past: with this life, as the checkpoints stand now.
    warned: signals that Slurm sent; and that it has begun a preemption, where it sent none to us.
    asked: somebody has said `ecdit stop`.
    state: the job's, where Slurm has sent SIGTERM.
    """
    kind = classes.of(ending.code)
    told = f"{kind.reason}{f' ({ending.why})' if ending.why and kind.then != classes.DONE else ''}"
    if not ending.lived and kind.then == classes.SAVED:
        told = "no life was begun"
    if kind.then == classes.DONE:
        return Decision(then=DONE, code=EXIT_OK, reason=told)
    if kind.then == classes.STOP:
        return Decision(then=STOP, code=ending.code, reason=told)
    if asked:
        return Decision(then=STOP, code=EXIT_REQUEUE, reason="stopped by `ecdit stop`; go on with: sbatch job.sh")
    if "TERM" in warned and (state is None or not state.ours):
        about = "squeue does not say how" if state is None else f"{state.state}, {state.reason}"
        # Not the ranks' 137 or 143: to the batch shell that would be the supervisor's own end by a signal.
        reason = f"Slurm ends this attempt itself ({about}); {told}"
        return Decision(then=LEAVE, code=EXIT_REQUEUE, reason=reason, taken="USR2" not in warned)
    if kind.then == classes.SAVED and not warned:
        reason = f"{told}; Slurm has not asked for it, so it does not come back by itself: sbatch job.sh"
        return Decision(then=STOP, code=EXIT_REQUEUE, reason=reason)
    if PREEMPTED in warned or (
        "TERM" in warned and "USR2" not in warned and state is not None and state.reason != "TimeLimit"
    ):
        return Decision(then=REQUEUE, code=EXIT_REQUEUE, reason=told, taken=True)
    if past.without_progress >= limits.without_progress:
        reason = f"{past.without_progress} lives in a row without a newer checkpoint; the last: {told}"
        return Decision(then=STOP, code=NoProgressError.exit_code, reason=reason)
    if past.lives >= limits.total:
        reason = f"{past.lives} lives, and the run is not finished; the last: {told}"
        return Decision(then=STOP, code=NoProgressError.exit_code, reason=reason)
    if warned:
        return Decision(then=REQUEUE, code=EXIT_REQUEUE, reason=told)
    if ending.bad or ending.lost:
        return Decision(then=REQUEUE, code=EXIT_REQUEUE, reason=told)
    return Decision(then=AGAIN, code=ending.code, reason=told, wait=back_off(past, limits))


def back_off(past: History, limits: Lives) -> float:
    """A life that got further costs no wait."""
    if not past.without_progress or not limits.back_off:
        return 0.0
    return limits.back_off[min(past.without_progress, len(limits.back_off)) - 1]

"""A life's step that should be over. A process that cannot be killed (it waits for a disk or a GPU that is gone) keeps its step,
and the step its GPUs: the next one would wait for them without a word."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ecdit_train.errors import EXIT_OK
from launch.decide import Ending
from launch.slurm import CALL_SECONDS, Slurm

NAME = "ecdit-life"
"""Of the steps that run ranks; somebody may look into the job by steps of their own."""
GONE_SECONDS = 45.0
"""From SIGKILL to the end of a step. Slurm itself drains a node that takes longer than UnkillableStepTimeout (60 s)."""
LOOK_SECONDS = 2.0


def check(slurm: Slurm, *, suspects: Sequence[str]) -> Ending:
    """Ending with code 0: no step is left, or a warning came. suspects: nodes that never said how the last life ended there."""
    steps = _left(slurm)
    if steps:  # Slurm may not have heard yet that it has ended
        slurm.outside.listen(LOOK_SECONDS)
        steps = _left(slurm)
    if steps:
        print(
            f"ecdit: job: {', '.join(steps)} of an earlier life has not ended: it is killed",
            file=sys.stderr,
            flush=True,
        )
        slurm.outside.call(["scancel", "--signal=KILL", *steps], seconds=CALL_SECONDS)
    deadline = slurm.outside.now() + GONE_SECONDS
    while steps and not slurm.outside.warned:
        if slurm.outside.now() >= deadline:
            words = "its processes of the last life cannot be killed"
            bad = tuple((host, words) for host in suspects)
            where = ", ".join(suspects) if suspects else "nobody knows on which node"
            return Ending(code=1, why=f"step {', '.join(steps)} of an earlier life does not end ({where})", bad=bad)
        slurm.outside.listen(LOOK_SECONDS)
        steps = _left(slurm)
    return Ending(code=EXIT_OK)


def _left(slurm: Slurm) -> list[str]:
    """Their numbers, as Slurm writes them."""
    command = ["squeue", "--noheader", "--steps", "--jobs", slurm.job, "--format", "%i|%j"]
    answer = slurm.outside.call(command, seconds=CALL_SECONDS)
    rows = [line.strip().split("|") for line in answer.out.splitlines()] if answer.code == 0 else []
    return [row[0] for row in rows if len(row) == 2 and row[1] == NAME and row[0].partition(".")[0] == slurm.name]

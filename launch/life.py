"""One life: the step that runs the ranks, from srun's start to its end."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ecdit_train.errors import EXIT_OK, EXIT_REQUEUE, PeerLostError
from launch import leftover, reports
from launch.decide import Ending
from launch.job_file import JobFile
from launch.outside import Outside
from launch.reports import Report

LOOK_SECONDS = 0.5
READ_SECONDS = 5.0
"""Between two looks at what the nodes say: a file each, on the shared file system, for weeks."""
AGAIN_SECONDS = 5.0
"""Between two warnings to the ranks, until they end: one that comes before a process listens is lost."""
SETTLE_SECONDS = 20.0
"""For the other nodes after one has failed: they lose it in their next exchange, or have been lost themselves."""
LINGER_SECONDS = 180.0
"""For the other nodes after one has left in good order: the first rank may still send its log to W&B."""
WAIT_SECONDS = 200
"""After which srun itself ends the others of a task that has ended, above LINGER_SECONDS: a launcher that was
killed before it could say that it had begun tells us nothing, and the ranks of the other nodes would wait for
its own until `watch.start`."""
BEGIN_SECONDS = 1800.0
"""For the first node to begin."""
END_SECONDS = 30.0
"""For srun to end its step."""


@dataclass(frozen=True, kw_only=True)
class Lived:
    """A life that is over."""

    ending: Ending
    began: tuple[str, ...]
    """Hosts whose launcher has come."""
    unheard: tuple[str, ...]
    """Hosts that began and never said how it ended, where the step had to be ended for them."""


def command(job: JobFile) -> list[str]:
    """srun, one node launcher a node. What a node's end means for the others is ours to say (`--kill-on-bad-exit=0`): srun would
    kill a rank that is still saving because another has left with code 75."""
    return [
        *(
            "srun",
            f"--job-name={leftover.NAME}",
            f"--nodes={job.nodes}",
            f"--ntasks={job.nodes}",
            "--ntasks-per-node=1",
        ),
        *("--kill-on-bad-exit=0", f"--wait={WAIT_SECONDS}", "--export=ALL", *job.srun),
        # Slurm's signals reach every process of a step, also one that does not listen yet.
        *("sh", "-c", "trap '' USR2; exec \"$@\"", "node"),
        *(job.python, "-m", "ecdit_train.cli", "--nproc", str(job.ranks_per_node), "--nodes", str(job.nodes)),
        *("resume", job.run, *job.words),
    ]


def live(job: JobFile, *, folder: Path, environ: Mapping[str, str], outside: Outside) -> Lived:
    """Until all nodes have ended, or those that do not are ended. Warnings go to the ranks as USR2, again and again: Slurm's
    SIGTERM reaches them without us, and a second one from us would make them leave without saving."""
    step = outside.start(command(job), environ=environ)
    began, passed_on, read_at, forced = outside.now(), float("-inf"), float("-inf"), False
    since: dict[str, float] = {}
    while step.poll() is None:
        now = outside.now()
        if outside.warned and now - passed_on >= AGAIN_SECONDS:
            passed_on = now
            step.send_signal(signal.SIGUSR2)
        if now - read_at >= READ_SECONDS:
            read_at = now
            if _is_overdue(reports.read(folder), since=since, now=now, began=began):
                forced = True
                _end(step, outside=outside)
                break
        outside.listen(LOOK_SECONDS)
    told = reports.read(folder)
    unheard = tuple(r.host for r in told if r.code is None) if forced else ()
    return Lived(
        ending=_ending(step.wait(), told, cause=reports.first_cause(folder)),
        began=tuple(r.host for r in told),
        unheard=unheard,
    )


def _is_overdue(told: Sequence[Report], *, since: dict[str, float], now: float, began: float) -> bool:
    """Whether those that have not ended have had their time; `since` remembers when others ended first."""
    if not told:
        return now - began > BEGIN_SECONDS
    ended = [report for report in told if report.code is not None]
    if not ended:
        return False
    failed = any(report.code not in (EXIT_OK, EXIT_REQUEUE) for report in ended)
    waited = now - since.setdefault("failed" if failed else "ended", now)
    return waited > (SETTLE_SECONDS if failed else LINGER_SECONDS)


def _end(step: subprocess.Popen, *, outside: Outside) -> None:
    """srun answers SIGTERM by killing its tasks; it waits for a node that is gone, so it is killed after a while."""
    print("ecdit: job: a node has ended and others have not: the step is ended", file=sys.stderr, flush=True)
    step.terminate()
    deadline = outside.now() + END_SECONDS
    while step.poll() is None and outside.now() < deadline:
        outside.listen(0.2)
    if step.poll() is None:
        step.kill()


def _ending(srun: int, told: Sequence[Report], *, cause: tuple[int, str] | None) -> Ending:
    """The first cause where anybody knows it; else a node's own word, before srun's, which is that of the last to be killed."""
    if cause is not None and cause[0] != EXIT_OK:
        return Ending(code=cause[0], why=cause[1])
    failed = [report for report in told if report.code]
    failed.sort(key=lambda report: report.code == PeerLostError.exit_code)
    if failed:
        return Ending(code=int(failed[0].code or 0), why=failed[0].why or f"on {failed[0].host}")
    code = srun if srun >= 0 else 128 - srun
    if not told and code:
        return Ending(code=code, why=f"the step was not launched: srun has ended with exit code {code}")
    return Ending(code=code)

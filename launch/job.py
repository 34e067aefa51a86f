"""The supervisor of a Slurm job, beside its batch shell: `python -m launch.job RUN/job.json`.

It runs lives of the run, one after another: checks of every node, then one step of srun. By the class of a life's exit code it
starts another one in the same allocation, puts the job back into the queue, or ends it. Every decision is a line in the log and
one in RUN/jobs/<job>.jsonl. Standard library and supervision only: no torch.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ecdit_train.errors import EXIT_OK, EXIT_REQUEUE, EcditError, NoProgressError, StorageError
from ecdit_train.run_folder import JOB_SCRIPT, JOBS
from ecdit_train.supervise import alert_file
from ecdit_train.supervise.exit_file import EXIT_FILE_VARIABLE
from launch import bandwidth, classes, interface, job_file, leftover, life, preflight, record, reports
from launch.comeback import Comeback
from launch.decide import AGAIN, DONE, LEAVE, PREEMPTED, REQUEUE, STOP, Decision, Ending, decide
from launch.entry import serve
from launch.job_file import JobFile
from launch.outside import Outside
from launch.place import expand, port_of
from launch.slurm import Slurm

SHORT = 3
"""Attempts in a row with too few nodes, after which somebody must look."""


@dataclass(kw_only=True)
class Supervisor:
    """See the module."""

    job: JobFile
    slurm: Slurm
    hosts: list[str]
    environ: Mapping[str, str]
    outside: Outside
    suspects: tuple[str, ...] = ()
    """Nodes that never said how the last life ended for them."""
    begun: bool = False
    """Whether this attempt has had a life."""
    answered: set[str] = field(default_factory=set)
    """Nodes that have passed through their checks in this attempt."""
    told_lead: bool = field(default=False)

    def run(self) -> int:
        """Lives until one of them is the last here. The exit code of the job."""
        if self._attempt and (why := self._is_over()):
            self._say(f"{why}, and Slurm has brought this one back (RequeueExit): cancelled")
            self.slurm.cancel()
            return EXIT_REQUEUE
        if len(self.hosts) < self.job.nodes:
            return self._ask_for_all()
        while True:
            decision, ending = self._life()
            self._tell(decision, ending)
            if decision.then == STOP and self._asked:
                return decision.code  # the request stays: RequeueExit may bring the job back
            if decision.then in (DONE, STOP, LEAVE):
                self._stop_path.unlink(missing_ok=True)
                return decision.code
            if decision.then == REQUEUE:
                return self._requeue(ending)
            self._wait(decision.wait)

    def _life(self) -> tuple[Decision, Ending]:
        """One, if nothing is against it."""
        run, number = Path(self.job.run), self._past().number + 1
        if self.outside.warned or self._asked:
            return self._not_begun()
        folder = run / JOBS / self.slurm.job / f"life-{number:04d}"
        environ = self._variables(folder, number=number)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            return self._decide(Ending(code=StorageError.exit_code, why=f"{folder} cannot be made: {error}"))
        try:
            ending = self._fit(folder, environ=environ)
            counts = ending.code == EXIT_OK or self.job.bad_node == "keep" or not (ending.bad or ending.lost)
            if counts and not self.outside.warned:
                step = record.committed_step(run)
                self._note("life", life=number, step=step, nodes=self.hosts, attempt=self._attempt)
                self.begun = True
            if ending.code == EXIT_OK and not self.outside.warned:
                self._say(
                    f"life {number} begins on {', '.join(self.hosts[:8])}{', ...' if len(self.hosts) > 8 else ''}"
                )
                lived = life.live(self.job, folder=folder, environ=environ, outside=self.outside)
                ending, self.suspects = lived.ending, lived.unheard
            elif ending.code == EXIT_OK:
                return self._not_begun()
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return self._decide(ending)

    def _not_begun(self) -> tuple[Decision, Ending]:
        """A time limit that warns before the first life of each attempt would never let one begin: it counts as one."""
        if "USR2" in self.outside.warned and not self.begun and not self._asked and not self.slurm.preempted():
            self._note("stuck", step=record.committed_step(Path(self.job.run)))
        return self._decide(Ending(code=EXIT_REQUEUE, lived=False))

    def _fit(self, folder: Path, *, environ: Mapping[str, str]) -> Ending:
        """Nodes that fell silent in the last life are asked first: the checks of all wait long for one that is gone."""
        suspects, self.suspects = self.suspects, ()
        if suspects:
            lost = tuple(self.slurm.silent(suspects))
            if lost and set(lost) < set(self.hosts):
                why = f"{', '.join(lost)} {'do' if len(lost) > 1 else 'does'} not answer"
                return Ending(code=preflight.UNKNOWN, why=why, lost=lost)
        left = leftover.check(self.slurm, suspects=suspects)
        if left.code != EXIT_OK or self.outside.warned:
            return left
        found = preflight.check(
            self.job, hosts=self.hosts, slurm=self.slurm, environ=environ, folder=folder, known=self.answered
        )
        if found.code != EXIT_OK:
            return found
        return bandwidth.check(self.job, hosts=self.hosts, slurm=self.slurm, environ=environ)

    def _decide(self, ending: Ending) -> tuple[Decision, Ending]:
        if (
            not self.outside.warned
            and classes.of(ending.code).then in (classes.SAVED, classes.AGAIN)
            and not self._asked
        ):
            self.outside.warned += [PREEMPTED] * self.slurm.preempted()
        warned = tuple(self.outside.warned)
        decision = decide(
            ending,
            past=self._past(),
            limits=self.job.lives,
            warned=warned,
            asked=self._asked,
            state=self.slurm.state() if "TERM" in warned else None,
        )
        if decision.code == NoProgressError.exit_code:
            words = f"job {self.slurm.job}: {decision.reason}"
            alert_file.append(Path(self.job.run), name="no-progress", level="error", state="on", words=words)
        return decision, ending

    def _requeue(self, ending: Ending) -> int:
        """The job's exit code."""
        host = self.environ.get("SLURMD_NODENAME", self.hosts[0])
        Comeback(job=self.job, slurm=self.slurm, hosts=self.hosts, host=host, say=self._say).go(ending)
        return EXIT_REQUEUE

    def _is_over(self) -> str | None:
        """Why there should be no further attempt of this job, if so."""
        lines = record.read(Path(self.job.run), self.slurm.job)
        last = [line for line in lines if line.get("what") in ("decision", "resubmitted")][-1:]
        if [line for line in last if line.get("then") == STOP] and self._asked:
            return "the run was stopped by `ecdit stop` (go on with: sbatch job.sh)"
        to = [str(line["to"]) for line in last if line.get("what") == "resubmitted"]
        return f"the run goes on as job {to[0]}" if to and to[0] != self.slurm.job else None

    def _ask_for_all(self) -> int:
        """A job that let a lost node go, and came back before it could ask for another one. The job's exit code."""
        tries = record.short(record.read(Path(self.job.run), self.slurm.job))
        if tries >= SHORT:
            raise EcditError(
                f"job {self.slurm.job} needs {self.job.nodes} nodes, and was given {len(self.hosts)} ({', '.join(self.hosts)}) "
                f"{tries + 1} times in a row; run: sbatch {self.job.run}/{JOB_SCRIPT}"
            )
        self._note("short", nodes=self.hosts)
        self._say(f"{len(self.hosts)} of {self.job.nodes} nodes: back into the queue")
        return self._requeue(Ending(code=EXIT_REQUEUE, lived=False))

    def _wait(self, seconds: float) -> None:
        """Back-off; a warning or a request to stop ends it."""
        until = self.outside.now() + seconds
        while (left := until - self.outside.now()) > 0 and not self.outside.warned and not self._asked:
            self.outside.listen(min(left, 1.0))

    def _tell(self, decision: Decision, ending: Ending) -> None:
        """The decision, and whether the lead that Slurm gives is long enough."""
        run = Path(self.job.run)
        past, step, need = self._past(), record.committed_step(run), record.needed_lead(run)
        facts = {"bad": dict(ending.bad), "lost": ending.lost, "warned": self.outside.warned, "wait": decision.wait}
        facts["taken"] = decision.taken
        self._note(
            "decision",
            life=past.number,
            then=decision.then,
            code=ending.code,
            exit_code=decision.code,
            reason=decision.reason,
            step=step,
            without_progress=past.without_progress,
            **{name: value for name, value in facts.items() if value},
            **({} if need is None else {"lead_needed": round(need, 1), "lead": self.job.lead}),
        )
        then = {
            DONE: "done",
            STOP: f"stop, exit code {decision.code}",
            AGAIN: f"again in this allocation{f' in {decision.wait:g} s' if decision.wait else ''}",
            REQUEUE: "back into the queue",
            LEAVE: "end",
        }[decision.then]
        at = f"step {step}" if step >= 0 else "no checkpoint yet"
        self._say(f"{decision.reason}; {at}: {then}")
        if need is not None and need > self.job.lead and not self.told_lead:
            self.told_lead = True
            self._say(
                f"a stop may take {need:.0f} s (slowest step, slowest save, margin), and Slurm's warning comes "
                f"{self.job.lead} s before the end: set cluster.signal_lead={-(-need // 10) * 10:.0f}"
            )

    def _variables(self, folder: Path, *, number: int) -> dict[str, str]:
        """The environment of a life's steps."""
        # A NODE_RANK of the shell that this was launched from would be every node's.
        env = {name: value for name, value in self.environ.items() if name != "NODE_RANK"}
        env |= {"PYTHONSAFEPATH": "1", reports.VARIABLE: str(folder)}
        env[EXIT_FILE_VARIABLE] = str(folder / reports.EXIT)
        env |= {"MASTER_ADDR": self.hosts[0], "MASTER_PORT": str(port_of(self.slurm.job, life=number))}
        if self.job.code and self.job.code not in (known := env.get("PYTHONPATH", "").split(os.pathsep)):
            env["PYTHONPATH"] = os.pathsep.join(filter(None, [self.job.code, *known]))
        if self.job.interface:
            env = interface.variables(self.job.interface) | env
        return env

    def _past(self) -> record.History:
        run = Path(self.job.run)
        return record.history(record.read(run, self.slurm.job), committed=record.committed_step(run))

    @property
    def _stop_path(self) -> Path:
        return record.stop_path(Path(self.job.run), self.slurm.job)

    @property
    def _asked(self) -> bool:
        return self._stop_path.exists()

    @property
    def _attempt(self) -> int:
        return _restarts(self.environ)

    def _note(self, what: str, **facts: object) -> None:
        record.add(Path(self.job.run), self.slurm.job, what=what, **facts)

    def _say(self, words: str) -> None:
        print(f"ecdit: job {self.slurm.job}: {words}", file=sys.stderr, flush=True)


def supervise(path: Path, *, environ: Mapping[str, str], outside: Outside) -> int:
    """Raises ConfigError for a damaged job file, EcditError outside of a Slurm job."""
    job = job_file.read(path)
    number, names = environ.get("SLURM_JOB_ID"), environ.get("SLURM_JOB_NODELIST", "")
    if not number or not names:
        raise EcditError(
            f"SLURM_JOB_ID and SLURM_JOB_NODELIST are not set: this is what {JOB_SCRIPT} starts; run: sbatch"
        )
    record.add(Path(job.run), number, what="begun", attempt=_restarts(environ))
    hosts = [names] if not set(names) & set("[,") else expand(names)
    if not hosts:
        raise EcditError(
            f"SLURM_JOB_NODELIST = {names!r} names no nodes, and `scontrol show hostnames` does not say which"
        )
    if len(hosts) > job.nodes or (len(hosts) < job.nodes and not _restarts(environ)):
        raise EcditError(f"{path} is about {job.nodes} nodes, and job {number} has {len(hosts)} ({names})")
    slurm = Slurm(outside=outside, job=number, environ=environ)
    try:
        return Supervisor(job=job, slurm=slurm, hosts=hosts, environ=environ, outside=outside).run()
    finally:  # not between lives: nodes remember a folder that was removed for a while (NFS)
        with contextlib.suppress(OSError):
            (Path(job.run) / JOBS / number).rmdir()


def _restarts(environ: Mapping[str, str]) -> int:
    return int(environ.get("SLURM_RESTART_COUNT") or 0)


def main(argv: Sequence[str]) -> int:
    return serve(
        argv, module="launch.job", work=lambda path, outside: supervise(path, environ=os.environ, outside=outside)
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

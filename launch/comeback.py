"""How a job comes back from the queue without what is wrong with its nodes: under its own number where Slurm lets it, since other
jobs may wait for that number; else as a new job."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ecdit_train.run_folder import JOB_SCRIPT
from launch import record
from launch.decide import Ending, back_off
from launch.job_file import JobFile
from launch.slurm import JobState, Slurm, is_final, is_unreached

PAUSES = (10.0, 20.0, 40.0, 60.0)
"""Seconds between two tries of what a busy or absent controller did not answer; the last one stays."""
TRY_SECONDS = 1800.0
"""For the controller to come back. Slurm may end us before."""


@dataclass(kw_only=True)
class Comeback:
    """See the module."""

    job: JobFile
    slurm: Slurm
    hosts: Sequence[str]
    host: str
    """Of the supervisor itself."""
    say: Callable[[str], None]
    resize: bool = field(init=False)
    """Whether the job has fewer nodes than it needs, so that Slurm must be told anew."""
    _tries: int = field(default=0, init=False)
    _until: float = field(init=False)

    def __post_init__(self) -> None:
        self.resize = len(self.hosts) < self.job.nodes
        self._until = self.slurm.outside.now() + TRY_SECONDS

    def go(self, ending: Ending) -> None:
        """Back into the queue, or it is said how to bring the job back. Slurm may end this process at any moment."""
        bad = [host for host, _ in ending.bad] if self.job.bad_node != "keep" else []
        lost = ending.lost if self.job.bad_node != "keep" else ()
        if self.job.bad_node == "drain":
            if lost and self.slurm.set_nodes(lost, state="down", why=ending.why) is None:
                self.say(f"{', '.join(lost)} set down: Slurm requeues the job itself")
                return
            if bad:
                refused = self.slurm.set_nodes(bad, state="drain", why=ending.why)
                self.say(f"{', '.join(bad)} {'drained' if refused is None else f'cannot be drained: {refused}'}")
                bad = bad if refused else []
        state = self._state() if bad or lost else self.slurm.state()
        known = self._known(state)
        away = None if known is None else self._away(known, bad=bad, lost=lost)
        out = [host for host in (*lost, *bad) if host in (away or ())]
        if kept := [host for host in (*bad, *lost) if host not in out]:
            self.say(f"the job cannot do without {', '.join(kept)}: there are no other nodes for it")
            self._stuck(kept)
            self._wait(0.0 if self.slurm.outside.warned else back_off(self._past(), self.job.lives))
        # A job that keeps a node which is gone is started again when that one has answered, so never. And where Slurm has refused
        # to leave a node out of the requeued job, it would get that one once more.
        was_refused = any(line.get("what") == "stuck" and line.get("refused") for line in self._lines())
        again = bool(lost) and not self._let_go(lost, state)
        if (again or (out and was_refused)) and away is not None and self._submit_again(away, lost=lost, without=out):
            return
        if self._requeue(away, lost=lost, without=out):
            self._change(None if away is None or set(away) == set(known or ()) else away, lost=lost, without=out)

    def _state(self) -> JobState | None:
        """As soon as the controller says."""
        while (state := self.slurm.state()) is None and self._pause():
            pass
        return state

    def _let_go(self, lost: Collection[str], state: JobState | None) -> bool:
        """Whether the job has no part in the lost nodes any more, or Slurm was first."""
        if state is None or not state.ours:
            return True
        if self.host in lost:
            return False
        refused = self.slurm.let_go([host for host in self.hosts if host not in lost])
        self.resize = self.resize or refused is None
        if refused is not None:
            self.say(f"job {self.slurm.job} keeps {', '.join(lost)}: {refused}")
        return refused is None

    def _requeue(self, away: Sequence[str] | None, *, lost: Collection[str], without: Sequence[str]) -> bool:
        """Whether the job is in the queue under its own number. Tried until a controller that is busy or away has answered: the run
        would be lost. A job that was cancelled must not rise again, so its state is asked for right before."""
        while True:
            state = self.slurm.state()
            if state is not None and not state.ours:
                self.say(f"Slurm has decided already ({state.state}, {state.reason})")
                return state.state != "CANCELLED"
            refused: str | None = "squeue does not answer"
            if state is not None or "TERM" not in self.slurm.outside.warned:
                refused = self.slurm.requeue()
            if refused is None:
                return True
            self.say(f"Slurm does not requeue job {self.slurm.job}: {refused}")
            if not is_final(refused) and self._pause():
                continue
            known = self._known(state) if away is None else away
            if known is None or not self._submit_again(known, lost=lost, without=without):
                self.say(f"the job does not come back by itself; run: sbatch {self._script}")
            return False

    def _change(self, exclude: Sequence[str] | None, *, lost: Collection[str], without: Sequence[str]) -> None:
        """Slurm ends this process now; it takes only a pending job's word about its nodes."""
        nodes = self.job.nodes if self.resize else None
        if nodes is None and exclude is None:
            return
        for _ in PAUSES:
            refused = self.slurm.ask(nodes=nodes, exclude=exclude)
            if refused is None or is_final(refused) or not self._pause():
                break
        if refused is not None:
            self.say(f"Slurm does not change the nodes of job {self.slurm.job}: {refused}")
            if without:
                self._stuck(without, refused=refused)
        elif without:
            self._note("excluded", nodes=without, lost=[host for host in lost if host in without])
            self.say(f"the job comes back without {', '.join(without)}")

    def _submit_again(self, away: Sequence[str], *, lost: Collection[str], without: Sequence[str]) -> bool:
        number, refused = self.slurm.submit_again(self._script, exclude=away)
        while number is None and is_unreached(refused) and "TERM" not in self.slurm.outside.warned and self._pause():
            number, refused = self.slurm.submit_again(self._script, exclude=away)
        if number is None:
            self.say(f"sbatch refused: {refused}")
            return False
        if without:
            self._note("excluded", nodes=without, lost=[host for host in lost if host in without])
        self._note("resubmitted", to=number, exclude=without)
        moved, still = self.slurm.move_waiting(number)
        if moved:
            self.say(f"{', '.join(moved)} waited for this job: now for job {number}")
        if still:
            self.say(f"waits for this job, and cannot be told to wait for job {number}: {'; '.join(still)}")
        self.say(f"the job goes on as job {number}{' without ' * bool(without)}{', '.join(without)}")
        return True

    def _pause(self) -> bool:
        """Before another try; False: there have been enough."""
        if self.slurm.outside.now() >= self._until:
            return False
        self._wait(PAUSES[min(self._tries, len(PAUSES) - 1)])
        self._tries += 1
        return True

    def _wait(self, seconds: float) -> None:
        """A warning that comes meanwhile ends it."""
        outside = self.slurm.outside
        heard, until = len(outside.warned), outside.now() + seconds
        while (left := until - outside.now()) > 0 and len(outside.warned) == heard:
            outside.listen(min(left, 1.0))

    def _known(self, state: JobState | None) -> list[str] | None:
        """Nodes that the job must not get as it is; None: not known."""
        if state is None:
            return None
        return self.slurm.expand(state.excluded) if state.excluded else []

    def _away(self, known: Sequence[str], *, bad: Sequence[str], lost: Sequence[str]) -> list[str]:
        """Nodes that it must not get when it comes back. Those that were lost and are up again are forgotten; and all that we
        ever left out, where so few others are left that the job could never start (Slurm would hold it for good)."""
        told = [line for line in self._lines() if line.get("what") == "excluded"]
        ours = {str(host) for line in told for host in line.get("nodes", [])}
        gone = {str(host) for line in told for host in line.get("lost", [])} & set(known)
        back = self.slurm.up(gone) if gone else set()
        theirs = [host for host in known if host not in ours]
        new = [host for host in (*lost, *bad) if host not in known]
        for away in ([*(h for h in known if h not in back), *new], [*theirs, *new]):
            if set(away) <= set(theirs) or self.slurm.fits(self._script, exclude=away):
                return away
        return theirs

    def _stuck(self, nodes: Sequence[str], **facts: object) -> None:
        """Nothing changes by itself then, so it counts as a life that got nowhere."""
        self._note("stuck", step=record.committed_step(Path(self.job.run)), nodes=nodes, **facts)

    def _past(self) -> record.History:
        return record.history(self._lines(), committed=record.committed_step(Path(self.job.run)))

    def _lines(self) -> list[record.Line]:
        return record.read(Path(self.job.run), self.slurm.job)

    def _note(self, what: str, **facts: object) -> None:
        record.add(Path(self.job.run), self.slurm.job, what=what, **facts)

    @property
    def _script(self) -> Path:
        return Path(self.job.run) / JOB_SCRIPT

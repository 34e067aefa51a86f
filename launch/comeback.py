"""How a job comes back from the queue without what is wrong with its nodes: under its own number where Slurm lets it, since other
jobs may wait for that number; else as a new job."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ecdit_train.run_folder import JOB_SCRIPT
from launch import record
from launch.decide import Ending
from launch.job_file import JobFile
from launch.slurm import Slurm


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

    def __post_init__(self) -> None:
        self.resize = len(self.hosts) < self.job.nodes

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
        known = self._known()
        away = self._away(known, bad=bad, lost=lost)
        out = [host for host in (*lost, *bad) if host in away]
        if out:
            self._note("excluded", nodes=out, lost=[host for host in lost if host in out])
        if set(bad) - set(out):
            # Nothing changes by itself then, so it counts as a life that got nowhere.
            self.say(f"the job cannot do without {', '.join(bad)}: there are no other nodes for it")
            self._note("stuck", step=record.committed_step(Path(self.job.run)))
        # A job that keeps a node which is gone is started again when that one has answered, so never.
        if lost and not self._let_go(lost) and self._submit_again(away, without=out):
            return
        self._requeue(away, known=known, without=out)

    def _let_go(self, lost: Collection[str]) -> bool:
        """Whether the job has no part in the lost nodes any more."""
        if self.host in lost:
            return False
        state = self.slurm.state()
        if state is None or state.state != "RUNNING":  # Slurm was first
            return state is not None
        refused = self.slurm.let_go([host for host in self.hosts if host not in lost])
        self.resize = self.resize or refused is None
        if refused is not None:
            self.say(f"job {self.slurm.job} keeps {', '.join(lost)}: {refused}")
        return refused is None

    def _requeue(self, away: Sequence[str], *, known: Sequence[str], without: Sequence[str]) -> None:
        refused = self.slurm.requeue()
        if refused is not None and self._is_ours():
            self.say(f"Slurm does not requeue job {self.slurm.job}: {refused}")
            if not self._submit_again(away, without=without):
                self.say(f"the job does not come back by itself; run: sbatch {self._script}")
            return
        # Slurm ends this process now; it takes only a pending job's word about its nodes.
        nodes = self.job.nodes if self.resize else None
        exclude = away if set(away) != set(known) else None
        if nodes is None and exclude is None:
            return
        refused = self.slurm.ask(nodes=nodes, exclude=exclude)
        if refused is not None:
            self.say(f"Slurm does not change the nodes of job {self.slurm.job}: {refused}")
        elif without:
            self.say(f"the job comes back without {', '.join(without)}")

    def _is_ours(self) -> bool:
        """Whether Slurm has not put the job into the queue itself meanwhile."""
        state = self.slurm.state()
        return state is None or state.state == "RUNNING"

    def _submit_again(self, away: Sequence[str], *, without: Sequence[str]) -> bool:
        number, refused = self.slurm.submit_again(self._script, exclude=away)
        if number is None:
            self.say(f"sbatch refused: {refused}")
            return False
        self._note("resubmitted", to=number, exclude=without)
        self.say(f"the job goes on as job {number}{' without ' * bool(without)}{', '.join(without)}")
        return True

    def _known(self) -> list[str]:
        """Nodes that the job must not get as it is."""
        state = self.slurm.state()
        return self.slurm.expand(state.excluded) if state is not None and state.excluded else []

    def _away(self, known: Sequence[str], *, bad: Sequence[str], lost: Sequence[str]) -> list[str]:
        """Nodes that it must not get when it comes back. Those that were lost and are up again are forgotten; and all that we
        ever left out, where so few others are left that the job could never start (Slurm would hold it for good)."""
        told = [line for line in record.read(Path(self.job.run), self.slurm.job) if line.get("what") == "excluded"]
        ours = {str(host) for line in told for host in line.get("nodes", [])}
        gone = {str(host) for line in told for host in line.get("lost", [])} & set(known)
        back = self.slurm.up(gone) if gone else set()
        theirs = [host for host in known if host not in ours]
        new = [host for host in (*lost, *bad) if host not in known]
        for away in ([*(h for h in known if h not in back), *new], [*theirs, *new]):
            if set(away) <= set(theirs) or self.slurm.fits(self._script, exclude=away):
                return away
        return theirs

    def _note(self, what: str, **facts: object) -> None:
        record.add(Path(self.job.run), self.slurm.job, what=what, **facts)

    @property
    def _script(self) -> Path:
        return Path(self.job.run) / JOB_SCRIPT

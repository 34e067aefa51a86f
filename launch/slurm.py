"""What the supervisor asks Slurm for, and tells it. Every call has a bound, and says why where it was refused."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from launch.outside import Answer, Outside
from launch.place import expand

CALL_SECONDS = 60.0
PROBE_SECONDS = 30.0
"""For a node to run one short program; Slurm itself gives up one that is gone after about ten (MessageTimeout)."""
FIRST_PROBE_SECONDS = 180.0
"""The same where it has run none in this attempt: a prolog may come before the first step."""
PROBES_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True)
class JobState:
    """A job as the controller sees it."""

    state: str
    """RUNNING, COMPLETING, CANCELLED, ..."""
    reason: str
    excluded: str
    """Nodes that it must not get, as Slurm writes them; empty: none."""

    @property
    def ours(self) -> bool:
        """Whether we may requeue the job: it still runs (a preemption's grace), or ran into its time limit. One that was cancelled
        must not rise again, and one that Slurm has requeued needs nothing."""
        return self.state in ("RUNNING", "RESIZING", "SIGNALING") or (
            self.reason == "TimeLimit" and self.state != "PENDING"
        )


def is_final(refused: str) -> bool:
    """Whether Slurm has understood and said no, so that another try is for nothing."""
    words = ("disabled", "permission", "permitted", "denied", "invalid", "not supported")
    return not is_unreached(refused) and any(word in refused.lower() for word in words)


def is_unreached(refused: str) -> bool:
    """Whether the controller certainly was not asked; a call that timed out may have been heard."""
    return any(
        word in refused.lower() for word in ("unable to contact", "connection refused", "standby", "connect failure")
    )


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """The job that this process belongs to."""

    outside: Outside
    job: str
    environ: Mapping[str, str]

    @property
    def name(self) -> str:
        """For scontrol: to it the number of an array means all tasks, and one of them has the same."""
        job, array, task = (self.environ.get(f"SLURM_{word}") for word in ("JOB_ID", "ARRAY_JOB_ID", "ARRAY_TASK_ID"))
        return f"{array}_{task}" if job == self.job and array and task else self.job

    def state(self) -> JobState | None:
        """None if the controller does not say."""
        command = ["squeue", "--noheader", "--jobs", self.job, "--format", "%A|%T|%r|%x"]
        answer = self.outside.call(command, seconds=CALL_SECONDS)
        lines = [[part.strip() for part in line.split("|", 3)] for line in answer.out.splitlines()]
        # The number of an array is that of one of its tasks too, and brings all of them.
        mine = [line[1:] for line in lines if len(line) == 4 and line[0] == self.job]
        if answer.code != 0 or not mine:
            return None
        state, reason, excluded = mine[0]
        return JobState(state=state, reason=reason, excluded="" if excluded in ("(null)", "N/A") else excluded)

    def preempted(self) -> bool:
        """Whether the controller has begun to take this attempt's nodes for another job. In the time that it leaves
        (GraceTime) SIGTERM goes to the steps alone, not to the batch shell."""
        answer = self.outside.call(
            ["scontrol", "show", "job", "-o", self.name],
            seconds=CALL_SECONDS,
            environ={**self.environ, "SLURM_TIME_FORMAT": "standard"},
        )
        facts = dict(re.findall(r"(?:^| )(PreemptTime|StartTime)=(\S*)", answer.out)) if answer.code == 0 else {}
        at = facts.get("PreemptTime", "")
        # An earlier attempt's, which Slurm has not forgotten, lies before this one's start.
        return at[:1].isdigit() and at >= facts.get("StartTime", "")

    def requeue(self) -> str | None:
        """Back into the queue: Slurm ends this attempt, and this process with it. None, or why not."""
        answer = self.outside.call(["scontrol", "requeue", self.name], seconds=CALL_SECONDS)
        return None if answer.code == 0 else answer.words

    def cancel(self) -> None:
        """Slurm ends this attempt, and never starts the job again."""
        self.outside.call(["scancel", self.name], seconds=CALL_SECONDS)

    def let_go(self, living: Iterable[str]) -> str | None:
        """The running job keeps these of its nodes alone. None, or why not."""
        command = ["scontrol", "update", f"JobId={self.name}", f"NodeList={','.join(living)}"]
        try:
            # scontrol leaves scripts for a job that was resized where it runs.
            with tempfile.TemporaryDirectory() as folder:
                answer = self.outside.call(command, seconds=CALL_SECONDS, cwd=folder)
        except OSError as error:
            return str(error)
        return None if answer.code == 0 else answer.words

    def ask(self, *, nodes: int | None, exclude: Iterable[str] | None) -> str | None:
        """How many nodes the requeued job needs, and which it must not get; None: as before. None, or why not."""
        facts = [f"NumNodes={nodes}"] if nodes is not None else []
        facts += [f"ExcNodeList={','.join(exclude)}"] if exclude is not None else []
        answer = self.outside.call(["scontrol", "update", f"JobId={self.name}", *facts], seconds=CALL_SECONDS)
        return None if answer.code == 0 else answer.words

    def up(self, hosts: Iterable[str]) -> set[str]:
        """Those that are no worse than others: idle, at work, or soon to be."""
        command = ["sinfo", "--noheader", "--Node", "--nodes", ",".join(hosts), "--format", "%N %t"]
        answer = self.outside.call(command, seconds=CALL_SECONDS)
        rows = [line.split() for line in answer.out.splitlines()] if answer.code == 0 else []
        # Behind the state: planned (-), or switched off or on to save power. `*`: it does not answer.
        fit = ("idle", "mix", "alloc", "comp", "plnd", "resv")
        return {row[0] for row in rows if len(row) == 2 and row[1].rstrip("-~#!%") in fit}

    def expand(self, names: str) -> list[str]:
        return expand(names, seconds=CALL_SECONDS)

    def set_nodes(self, nodes: Iterable[str], *, state: str, why: str) -> str | None:
        """`drain` or `down`, which only Slurm's operators may. None, or why not."""
        command = ["scontrol", "update", f"NodeName={','.join(nodes)}", f"State={state}", f"Reason=ecdit: {why}"]
        answer = self.outside.call(command, seconds=CALL_SECONDS)
        return None if answer.code == 0 else answer.words

    def submit_again(self, script: Path, *, exclude: Iterable[str]) -> tuple[str | None, str]:
        """The same script as a new job, one task of an array as one, which waits for nobody: (its number or None, why not)."""
        task = self.environ.get("SLURM_ARRAY_TASK_ID")
        answer = self._sbatch("--parsable", *([f"--array={task}"] if task else []), script=script, exclude=exclude)
        number = answer.out.strip().partition(";")[0]
        return (number, "") if answer.code == 0 and number.isdigit() else (None, answer.words)

    def move_waiting(self, number: str) -> tuple[list[str], list[str]]:
        """This user's jobs that wait for this one wait for job `number` from now on: (those that do, why others do not). Slurm
        would cancel them at this one's end, or let them wait for good."""
        answer = self.outside.call(["squeue", "--me", "--noheader", "--format", "%i|%E"], seconds=CALL_SECONDS)
        moved, refused = [], []
        for line in answer.out.splitlines() if answer.code == 0 else ():
            job, _, waits = line.strip().partition("|")
            now = re.sub(rf"(?<=:){re.escape(self.name)}(?![\d_])", number, told := re.sub(r"\([^)]*\)", "", waits))
            if now == told:
                continue
            said = self.outside.call(["scontrol", "update", f"JobId={job}", f"Dependency={now}"], seconds=CALL_SECONDS)
            if said.code == 0:
                moved.append(job)
            else:
                refused.append(f"{job}: {said.words}")
        return moved, refused

    def fits(self, script: Path, *, exclude: Iterable[str]) -> bool:
        """Whether the job could start on the nodes that are left. One that could not Slurm holds for good, with priority 0."""
        answer = self._sbatch("--test-only", script=script, exclude=exclude)
        # Not the partition's, which may be down for now.
        return answer.code == 0 or "requested node configuration is not available" not in answer.words.lower()

    def _sbatch(self, *options: str, script: Path, exclude: Iterable[str]) -> Answer:
        away = [f"--exclude={names}"] if (names := ",".join(exclude)) else []
        # What Slurm told this job must not look as if it had told the new one.
        clean = {k: v for k, v in self.environ.items() if k == "SLURM_CONF" or not k.startswith(("SLURM", "SBATCH"))}
        return self.outside.call(
            ["sbatch", *options, "--dependency=", *away, str(script)],
            seconds=CALL_SECONDS,
            environ=clean,
            cwd=self.environ.get("SLURM_SUBMIT_DIR"),
        )

    def silent(self, hosts: Iterable[str], *, seconds: float = PROBE_SECONDS) -> list[str]:
        """Those that do not run a program in time. One srun a node: one for all of them fails for all when one node is gone."""
        left, lost = list(hosts), []
        while left:
            batch, left = left[:PROBES_AT_ONCE], left[PROBES_AT_ONCE:]
            step = ["srun", "--overlap", "--nodes=1", "--ntasks=1", "--export=ALL", "--quiet"]
            tries = [(h, self.outside.start([*step, f"--nodelist={h}", "true"], environ=self.environ)) for h in batch]
            deadline = self.outside.now() + seconds
            while self.outside.now() < deadline and any(process.poll() is None for _, process in tries):
                self.outside.listen(0.2)
            for host, process in tries:
                if process.poll() != 0:
                    lost.append(host)
                if process.poll() is None:
                    process.kill()
                process.wait()
        return lost

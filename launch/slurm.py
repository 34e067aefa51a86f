"""What the supervisor asks Slurm for, and tells it. Every call has a bound, and says why where it was refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from launch.outside import Outside

CALL_SECONDS = 60.0
PROBE_SECONDS = 30.0
"""For a node to run one short program; Slurm itself gives up one that is gone after about ten (MessageTimeout)."""
PROBES_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True)
class JobState:
    """A job as the controller sees it."""

    state: str
    """RUNNING, COMPLETING, CANCELLED, ..."""
    reason: str
    excluded: str
    """Nodes that it must not get, as Slurm writes them; empty: none."""


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """The job that this process belongs to."""

    outside: Outside
    job: str
    environ: Mapping[str, str]

    def state(self) -> JobState | None:
        """None if the controller does not say."""
        answer = self.outside.call(
            ["squeue", "--noheader", "--jobs", self.job, "--format", "%T|%r|%x"], seconds=CALL_SECONDS
        )
        parts = answer.out.strip().splitlines()[:1]
        if answer.code != 0 or not parts or parts[0].count("|") < 2:
            return None
        state, reason, excluded = (part.strip() for part in parts[0].split("|", 2))
        return JobState(state=state, reason=reason, excluded="" if excluded in ("(null)", "N/A") else excluded)

    def requeue(self) -> str | None:
        """Back into the queue: Slurm ends this attempt, and this process with it. None, or why not."""
        answer = self.outside.call(["scontrol", "requeue", self.job], seconds=CALL_SECONDS)
        return None if answer.code == 0 else answer.words

    def exclude(self, nodes: Iterable[str]) -> str | None:
        """The requeued job must not get these nodes, besides those it must not get already. None, or why not."""
        names = self._with_excluded(nodes)
        answer = self.outside.call(
            ["scontrol", "update", f"JobId={self.job}", f"ExcNodeList={names}"], seconds=CALL_SECONDS
        )
        return None if answer.code == 0 else answer.words

    def set_nodes(self, nodes: Iterable[str], *, state: str, why: str) -> str | None:
        """`drain` or `down`, which only Slurm's operators may. None, or why not."""
        command = ["scontrol", "update", f"NodeName={','.join(nodes)}", f"State={state}", f"Reason=ecdit: {why}"]
        answer = self.outside.call(command, seconds=CALL_SECONDS)
        return None if answer.code == 0 else answer.words

    def submit_again(self, script: Path, *, exclude: Iterable[str]) -> tuple[str | None, str]:
        """The same script as a new job, one task of an array as one: (its number or None, why not).

        For a job that cannot come back itself: Slurm starts a requeued one when all its old nodes have answered, and waits
        SlurmdTimeout for one that is gone.
        """
        command = ["sbatch", "--parsable"]
        if names := self._with_excluded(exclude):
            command.append(f"--exclude={names}")
        if task := self.environ.get("SLURM_ARRAY_TASK_ID"):
            command.append(f"--array={task}")
        # What Slurm told this job must not look as if it had told the new one.
        clean = {k: v for k, v in self.environ.items() if k == "SLURM_CONF" or not k.startswith(("SLURM", "SBATCH"))}
        answer = self.outside.call(
            [*command, str(script)],
            seconds=CALL_SECONDS,
            environ=clean,
            cwd=self.environ.get("SLURM_SUBMIT_DIR"),
        )
        number = answer.out.strip().partition(";")[0]
        return (number, "") if answer.code == 0 and number.isdigit() else (None, answer.words)

    def silent(self, hosts: Iterable[str]) -> list[str]:
        """Those that do not run a program within `PROBE_SECONDS`. One srun a node: one for all of them fails for all
        when one node is gone."""
        left, lost = list(hosts), []
        while left:
            batch, left = left[:PROBES_AT_ONCE], left[PROBES_AT_ONCE:]
            step = ["srun", "--overlap", "--nodes=1", "--ntasks=1", "--export=ALL", "--quiet"]
            tries = [(h, self.outside.start([*step, f"--nodelist={h}", "true"], environ=self.environ)) for h in batch]
            deadline = self.outside.now() + PROBE_SECONDS
            while self.outside.now() < deadline and any(process.poll() is None for _, process in tries):
                self.outside.listen(0.2)
            for host, process in tries:
                if process.poll() != 0:
                    lost.append(host)
                if process.poll() is None:
                    process.kill()
                process.wait()
        return lost

    def _with_excluded(self, nodes: Iterable[str]) -> str:
        known = self.state()
        return ",".join(filter(None, [known.excluded if known else "", *nodes]))

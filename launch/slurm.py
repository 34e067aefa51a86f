"""What the supervisor asks Slurm for, and tells it. Every call has a bound, and says why where it was refused."""

from __future__ import annotations

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

    def let_go(self, living: Iterable[str]) -> str | None:
        """The running job keeps these of its nodes alone. None, or why not."""
        command = ["scontrol", "update", f"JobId={self.job}", f"NodeList={','.join(living)}"]
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
        answer = self.outside.call(["scontrol", "update", f"JobId={self.job}", *facts], seconds=CALL_SECONDS)
        return None if answer.code == 0 else answer.words

    def up(self, hosts: Iterable[str]) -> set[str]:
        """Those that Slurm could give to a job now."""
        command = ["sinfo", "--noheader", "--Node", "--nodes", ",".join(hosts), "--format", "%N %t"]
        answer = self.outside.call(command, seconds=CALL_SECONDS)
        rows = [line.split() for line in answer.out.splitlines()] if answer.code == 0 else []
        # A `*` behind the state: it does not answer.
        return {row[0] for row in rows if len(row) == 2 and row[1] in ("idle", "mix", "alloc")}

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

    def fits(self, script: Path, *, exclude: Iterable[str]) -> bool:
        """Whether the job could start on the nodes that are left. One that could not Slurm holds for good, with priority 0."""
        answer = self._sbatch("--test-only", script=script, exclude=exclude)
        return answer.code == 0 or "not available" not in answer.words

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

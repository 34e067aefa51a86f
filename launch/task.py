"""One command of ours as a Slurm job, beside its batch shell: `python -m launch.task RUN/job.json`.

There is no life to supervise: the command does its work or it does not, and its exit code is the job's, so that jobs that come
after it (`--after`) can trust it. A lost node is Slurm's to requeue. Only 75 (stopped, to be run again) puts the job back into
the queue from here.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ecdit_train.errors import EXIT_REQUEUE, EcditError, NoProgressError
from launch import job_file
from launch.entry import serve
from launch.job_file import JobFile
from launch.outside import Outside
from launch.slurm import Slurm

TASK = "SLURM_ARRAY_TASK_ID"
"""Stands in the command for the number of the array's task."""
LISTEN = ("study",)
"""Verbs that answer Slurm's warning by saving; the others use the whole time."""
LOOK_SECONDS = 0.5
AGAIN_SECONDS = 5.0


def command(job: JobFile, *, environ: Mapping[str, str]) -> list[str]:
    """srun, one task: in the container where there is one, and where Slurm counts what it uses."""
    words = [word.replace(TASK, environ.get(TASK, "")) for word in job.words]
    return [
        *("srun", "--nodes=1", "--ntasks=1", "--export=ALL", *job.srun),
        *("sh", "-c", "trap '' USR2; exec \"$@\"", "task"),  # one that comes before a verb listens would kill it
        *(job.python, "-m", "ecdit_train.cli", *words),
    ]


def run(path: Path, *, environ: Mapping[str, str], outside: Outside) -> int:
    """The job's exit code. Raises ConfigError for a damaged job file, EcditError outside of a Slurm job."""
    job, number = job_file.read(path), environ.get("SLURM_JOB_ID")
    if not number:
        raise EcditError("SLURM_JOB_ID is not set: this is what job.sh starts; run: sbatch")
    # A NODE_RANK of the shell that this was submitted from says nothing here.
    clean = {name: value for name, value in environ.items() if name != "NODE_RANK"}
    step = outside.start(command(job, environ=environ), environ={**clean, "PYTHONSAFEPATH": "1"})
    listens, passed_on = bool(set(LISTEN) & set(job.words)), float("-inf")
    while step.poll() is None:
        # Slurm's SIGTERM reaches the step without us.
        if listens and outside.warned and outside.now() - passed_on >= AGAIN_SECONDS:
            passed_on = outside.now()
            step.send_signal(signal.SIGUSR2)
        outside.listen(LOOK_SECONDS)
    code = step.returncode if step.returncode >= 0 else 128 - step.returncode
    if code != EXIT_REQUEUE:
        _say(number, f"exit code {code}")
        return code
    return _again(job, Slurm(outside=outside, job=number, environ=environ))


def _again(job: JobFile, slurm: Slurm) -> int:
    """Stopped with everything saved: back into the queue, unless somebody took it out or it never ends."""
    state = slurm.state()
    if state is not None and state.state in ("CANCELLED", "PENDING", "COMPLETING"):
        return EXIT_REQUEUE
    if int(slurm.environ.get("SLURM_RESTART_COUNT") or 0) + 1 >= job.lives.total:
        _say(slurm.job, f"stopped {job.lives.total} times (cluster.lives): somebody must look")
        return NoProgressError.exit_code
    refused = slurm.requeue()
    _say(
        slurm.job,
        "back into the queue" if refused is None else f"not requeued: {refused}; run: sbatch {job.run}/job.sh",
    )
    return EXIT_REQUEUE


def _say(job: str, words: str) -> None:
    print(f"ecdit: job {job}: {words}", file=sys.stderr, flush=True)


def main(argv: Sequence[str]) -> int:
    return serve(argv, module="launch.task", work=lambda path, outside: run(path, environ=os.environ, outside=outside))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

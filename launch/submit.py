"""Prepares a run folder on the login node and hands its script to Slurm. A submission that is refused leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from textwrap import indent

from ecdit_train import atomic
from ecdit_train.config.compat import check_resume, diff
from ecdit_train.config.schema import RunConfig
from ecdit_train.config.stored import freeze, load
from ecdit_train.config.validate import validate
from ecdit_train.errors import ConfigError, EcditError, Problem, RunOwnedError, StorageError
from ecdit_train.run_folder import CODE, JOB_FILE, JOB_SCRIPT, LOGS, RANKS_SCRIPT, RESOLVED
from ecdit_train.secrets import hide_forms
from ecdit_train.supervise import lease
from launch import cluster_check, cluster_facts, description, inputs, record
from launch.render import log_path, render
from launch.snapshot import Snapshot, take

SBATCH_SECONDS = 120.0
"""How long sbatch may take; a busy controller makes it try again by itself."""


class SubmitError(EcditError):
    """Slurm is not here, or it refused the job."""

    exit_code = 83


@dataclass(frozen=True, kw_only=True)
class Job:
    """What would be submitted."""

    cfg: RunConfig
    run: Path
    """Absolute."""
    snapshot: Snapshot
    script: str
    files: description.JobFiles
    problems: tuple[Problem, ...]
    """Why it should not be submitted here; found by looking at the cluster, the data and the plan."""
    notes: tuple[str, ...]
    cluster: tuple[str, ...] = ()
    """What the cluster has, for people."""
    freezes: bool = True
    """Whether the folder is a run's, which keeps its configuration."""

    def text(self) -> str:
        """All of it: the script, and the rest below it as comments."""
        parts = [(JOB_FILE, self.files.text), (RANKS_SCRIPT, self.files.ranks)]
        below = [f"{self.run / name}\n{text}" for name, text in parts if text is not None]
        below.append(f"code: {len(self.snapshot.files)} files in {self.snapshot.folder(self.run)}\n")
        return self.script + "".join("\n" + indent(text, "# ") for text in below)


def compose_job(cfg: RunConfig, *, run: str | Path | None = None, look: bool = True, after: Sequence[str] = ()) -> Job:
    """Everything that `submit` writes and submits; writes nothing.

    Args:
        cfg: what the user asks for.
        run: run folder on the nodes; default `cfg.run`, seen from here.
        look: whether to look at the cluster, the data and the plan, too.
        after: jobs that come first; what is not there yet they may make.

    Raises:
        ConfigError: the configuration does not fit the cluster's nodes, holds a secret, or the code does.
    """
    validate(cfg, world=cfg.cluster.nodes * cfg.cluster.gpus_per_node)
    place = Path(cfg.run if run is None else run).absolute()
    snapshot = take(config_dir=cfg.config_dir)
    code = str(snapshot.folder(place))
    problems: list[Problem] = []
    notes: list[str] = []
    planned, cluster = inputs.Planned(), tuple[str, ...]()
    if look:
        lacking = list(inputs.problems(cfg))
        if after or cfg.cluster.dependency:
            notes += [f"not there yet, a job before this one must make it: {problem}" for problem in lacking]
        else:
            problems += lacking
        cluster, more, told = look_at_cluster(cfg)
        problems += more
        notes += told
        planned = inputs.plan(cfg)
        problems += planned.problems
        notes += [planned.note] if planned.note else []
    files = description.describe(
        cfg,
        run=str(place),
        code=code,
        cwd=os.getcwd(),
        words=snapshot.words(place),
        checkpoint_bytes=planned.checkpoint_bytes,
    )
    script = render(
        cfg, run=str(place), code=code, job_python=cfg.cluster.job_python or sys.executable, cwd=os.getcwd()
    )
    return Job(
        cfg=cfg,
        run=place,
        snapshot=snapshot,
        script=script,
        files=files,
        problems=tuple(problems),
        notes=tuple(notes),
        cluster=cluster,
    )


def look_at_cluster(cfg: RunConfig) -> tuple[tuple[str, ...], list[Problem], list[str]]:
    """(what there is, what it cannot give, what will keep the job waiting)"""
    try:
        facts = cluster_facts.ask()
    except cluster_facts.UnknownClusterError as error:
        return (), [], [f"the cluster was not checked: {error}"]
    return facts.lines(), cluster_check.problems(cfg.cluster, facts), cluster_check.notes(cfg.cluster, facts)


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """A job that Slurm has taken."""

    job: int
    run: str
    """As the user named it."""
    log: str

    def text(self) -> str:
        run = shlex.quote(self.run)
        return (
            f"job {self.job} submitted: {self.run}\n"
            f"  log          {self.log}\n"
            f"  how it goes  ecdit status {run}\n"
            f"  save, stop   ecdit stop {run}\n"
            f"  take it out  scancel {self.job}"
        )


def launch(cfg: RunConfig, *, allow: Collection[str] = (), after: Sequence[str] = ()) -> Submitted:
    """Checks, writes the run folder and submits.

    The folder may exist: launching again is resuming, and may change what a resume may change. If Slurm refuses, the
    folder is as it was before.

    Args:
        cfg: what the user asks for.
        allow: dotted keys given explicitly on the command line; only they may change the schedule.
        after: jobs that must have ended well before this one starts.

    Raises:
        ConfigError: what `compose_job` raises, or the cluster cannot run the job, or something that it needs is not there.
        RunOwnedError: a job that runs, may still run or waits has the folder.
        RunFolderError: the folder belongs to another run, or to another schedule that was not asked for.
        SubmitError: there is no Slurm, or it refused the job.
    """
    return send(prepare(cfg, allow=allow, after=after), after=after)


def prepare(cfg: RunConfig, *, allow: Collection[str] = (), after: Sequence[str] = ()) -> Job:
    """What `launch` is going to write and submit, once nobody has the folder; writes nothing. Its problems are not raised."""
    need_sbatch("train here: ecdit train")
    run = Path(cfg.run).absolute()
    first = _owner(cfg, run, after=after)
    if (run / RESOLVED).exists():
        check_resume(replace(load(run), run=cfg.run), cfg, allow)  # the folder was found: its old name says nothing
    job = compose_job(cfg, after=after)
    if first is not None:
        _refuse_changes(job, first=first)
    return job


def send(job: Job, *, after: Sequence[str]) -> Submitted:
    """A prepared job to Slurm, as `launch` does."""
    number = hand_in(job, after=after)
    record.add(job.run, str(number), what="submitted")  # so that `status` and `stop` find it before it runs
    return Submitted(job=number, run=job.cfg.run, log=log_path(job.cfg, run=str(job.run), job=number))


def need_sbatch(instead: str) -> None:
    """Raises SubmitError where this machine has none."""
    if shutil.which("sbatch") is None:
        raise SubmitError(f"sbatch was not found; use a Slurm login node, look with --render-only, or {instead}")


def hand_in(job: Job, *, after: Sequence[str]) -> int:
    """Writes the folder and submits; the number. Raises what `launch` does, and then the folder is as it was."""
    for note in job.notes:
        print(f"ecdit: {note}", file=sys.stderr)
    if job.problems:
        raise ConfigError(job.problems)
    with _put_back(job.run) as changes:
        script = changes.write_all(job)
        return submit(script, cwd=os.getcwd(), cluster=job.cluster, cfg=job.cfg, after=after)


def _owner(cfg: RunConfig, run: Path, *, after: Sequence[str]) -> str | None:
    """The job that runs or waits in the folder, where this one is to come after it; None where nobody has it. Raises
    RunOwnedError otherwise: two jobs on one folder, and the second would end with the same words, an hour later."""
    held = lease.read(run)
    owner = None if held is None else held.owner
    gone = True if owner is None else lease.is_gone(owner)
    follows = after or cfg.cluster.dependency is not None  # asked for: it comes after the other
    if (gone is False or (gone is None and owner is not None and owner.job is not None)) and not _is_one_of(
        owner, [*after, *re.findall(r"\d[\d_]*", cfg.cluster.dependency or "")]
    ):
        raise RunOwnedError(f"{cfg.run} is owned by {owner}; stop it first: ecdit stop {cfg.run}")
    with contextlib.suppress(cluster_facts.UnknownClusterError):
        for line in cluster_facts.output("squeue", "--me", "-h", "-o", "%i|%T|%o").splitlines():
            number, _, rest = line.strip().partition("|")
            state, _, command = rest.partition("|")
            if command.strip() == str(run / JOB_SCRIPT) and state not in lease.ENDED - {"PENDING"}:
                if follows:
                    return number
                raise RunOwnedError(
                    f"{cfg.run}: job {number} of this folder is {state}; take it out first (scancel {number}), "
                    f"or come after it: cluster.dependency=afterany:{number}"
                )
    return owner.job if gone is not True and owner is not None else None


def _refuse_changes(job: Job, *, first: str) -> None:
    """A job that comes after another of the same folder finds what that one was told, and the other way round: the first may
    come back, and must not be told anew. Raises RunOwnedError."""
    changed: list[str] = []
    with contextlib.suppress(FileNotFoundError):
        if (job.run / RESOLVED).exists():
            found = diff(load(job.run), job.cfg)
            changed = [f"{c.field}: {c.old!r} -> {c.new!r}" for c in found if c.field not in NOT_ITS_OWN]
        if not changed and (job.run / JOB_FILE).read_text() != job.files.text:
            changed = ["the code, its environment or the nodes"]
    if changed:
        raise RunOwnedError(
            f"{job.cfg.run}: job {first} of this folder may still run, and these words would change it ({'; '.join(changed)}): "
            f"launch the same words after it, or stop it first (ecdit stop {job.cfg.run}), or take another run folder"
        )


NOT_ITS_OWN = ("run", "config_dir", "cluster.dependency")
"""Keys in which two jobs of one run differ: where the folder and the code were found from, and whom they wait for."""


def _is_one_of(owner: lease.Owner | None, after: Sequence[str]) -> bool:
    return owner is not None and owner.job is not None and owner.job in after


# --- the run folder, and how it was before ---------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Changes:
    """What this call changed in a run folder. A job that Slurm may have taken keeps it."""

    new: list[Path] = field(default_factory=list)
    """Files and folders that were not there, in the order of their making."""
    code: Path | None = None
    """The snapshot, if it was not there."""
    before: dict[Path, tuple[bytes, int]] = field(default_factory=dict)
    """Content and mode of files that were."""

    def folder(self, path: Path) -> None:
        missing = [path, *path.parents][: next(n for n, p in enumerate([path, *path.parents]) if p.exists())]
        for one in reversed(missing):
            one.mkdir(exist_ok=True)
            self.new.append(one)

    def about_to_write(self, path: Path) -> None:
        if path.exists():
            self.before[path] = (path.read_bytes(), path.stat().st_mode & 0o777)
        else:
            self.new.append(path)

    def write_all(self, job: Job) -> Path:
        """The code, the frozen configuration, what the supervisor reads, and the script, whose path it returns."""
        self.folder(job.run / CODE)
        self.folder(job.run / LOGS)
        self.code = job.snapshot.write(job.run)
        if job.freezes:
            self.about_to_write(job.run / RESOLVED)
            freeze(job.cfg, job.run)
        texts = {
            JOB_FILE: (job.files.text, 0o644),
            RANKS_SCRIPT: (job.files.ranks, 0o755),
            JOB_SCRIPT: (job.script, 0o755),
        }
        for name, (text, mode) in texts.items():
            if text is not None:
                self.about_to_write(job.run / name)
                atomic.write(job.run / name, text.encode(), mode=mode)
        return job.run / JOB_SCRIPT

    def undo(self) -> None:
        """What others put beside it meanwhile stays, and so do the folders that hold it."""
        for path, (content, mode) in self.before.items():
            atomic.write(path, content, mode=mode)
        if self.code is not None:
            shutil.rmtree(self.code, ignore_errors=True)
        for path in reversed(self.new):
            with contextlib.suppress(OSError):
                if path.is_dir():
                    path.rmdir()
                else:
                    path.unlink()


@contextlib.contextmanager
def _put_back(run: Path) -> Iterator[_Changes]:
    """Undoes what was changed inside, if it fails before Slurm may have taken the job."""
    changes = _Changes()
    try:
        yield changes
    except _UnclearError as error:
        raise SubmitError(str(error)) from error
    except OSError as error:
        changes.undo()
        raise StorageError(f"{run} cannot be written: {error}") from error
    except BaseException:
        changes.undo()
        raise


class _UnclearError(Exception):
    """sbatch ended in a way that leaves open whether there is a job: what it would run must stay."""


# --- Slurm -------------------------------------------------------------------------------------------------------------


def submit(script: Path, *, cwd: str, cluster: Collection[str], cfg: RunConfig, after: Sequence[str] = ()) -> int:
    """Hands a written script to `sbatch`; returns the job id. Jobs to come after are said here, not in the script: it may be
    submitted again when they are long forgotten."""
    wait = [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"] if after else []
    command = ["sbatch", "--parsable", *wait, str(script)]
    try:
        answer = subprocess.run(
            command, cwd=cwd, env=_environment(cfg), capture_output=True, text=True, timeout=SBATCH_SECONDS, check=False
        )
    except (subprocess.TimeoutExpired, KeyboardInterrupt) as error:
        why = (
            "was interrupted" if isinstance(error, KeyboardInterrupt) else f"has not answered for {SBATCH_SECONDS:g} s"
        )
        raise _UnclearError(f"sbatch {why}: look with `squeue --me` whether there is a job of {script}") from error
    number = answer.stdout.strip().partition(";")[0]  # `--parsable` answers "id" or "id;cluster"
    said = hide_forms(" ".join((answer.stderr or answer.stdout).split()))
    if answer.returncode != 0:
        there = "".join(f"\n  there is {line}" for line in cluster)
        raise SubmitError(f"sbatch refused the job (exit code {answer.returncode}): {said}{there}")
    if not number.isdigit():
        raise _UnclearError(f"sbatch answered {said!r}: look with `squeue --me` whether there is a job of {script}")
    return int(number)


def _environment(cfg: RunConfig) -> dict[str, str]:
    """sbatch's environment, which the job gets too. sbatch's own variables (SBATCH_TIMELIMIT ...) would win over the script's
    lines without a word, so those about what the configuration says are left out; and what Slurm told the job that this shell
    belongs to, if it does, is not about the new one."""
    said = {name for name, key in OPTIONAL.items() if getattr(cfg.cluster, key) not in (None, False)} | ALWAYS_SAID
    inside = "SLURM_JOB_ID" in os.environ
    return {
        name: value
        for name, value in os.environ.items()
        if not (name.startswith("SBATCH_") and name.removeprefix("SBATCH_") in said)
        and not (inside and name.startswith("SLURM") and name not in THE_USERS)
    }


THE_USERS = ("SLURM_CONF", "SLURM_JWT")
"""Where Slurm is, and who asks: not about a job."""
OPTIONAL = {
    "ACCOUNT": "account",
    "ARRAY_INX": "array",
    "CONSTRAINT": "constraint",
    "EXCLUSIVE": "exclusive",
    "MEM_PER_CPU": "mem",
    "MEM_PER_GPU": "mem",
    "MEM_PER_NODE": "mem",
    "PARTITION": "partition",
    "QOS": "qos",
    "RESERVATION": "reservation",
}
"""sbatch's variables (without SBATCH_) -> keys that say the same, where they say something."""
ALWAYS_SAID = {
    *("GPUS", "GPUS_PER_NODE", "GPUS_PER_TASK", "JOB_NAME", "NO_REQUEUE", "OPEN_MODE", "OUTPUT", "ERROR", "REQUEUE"),
    *("CPUS_PER_GPU", "CPUS_PER_TASK", "SIGNAL", "TIMELIMIT"),
}

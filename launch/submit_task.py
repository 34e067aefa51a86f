"""One command of ours as a Slurm job (`ecdit submit`): in a folder of its own, with the cluster file, the code's copy and the
rules about secrets of `ecdit launch`. A refusal leaves nothing behind."""

from __future__ import annotations

import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ecdit_train.config.cluster import ClusterConfig
from ecdit_train.config.cluster_rules import INSTEAD
from ecdit_train.config.schema import RunConfig
from ecdit_train.errors import ConfigError, Problem, RunFolderError
from ecdit_train.run_folder import JOB_SCRIPT
from ecdit_train.secrets import form_of
from launch import description
from launch.render import log_path, render
from launch.snapshot import take
from launch.submit import Job, hand_in, look_at_cluster
from launch.task import TASK

JOBS = Path("runs") / "jobs"


@dataclass(frozen=True, kw_only=True)
class Task:
    """A command, and what it needs."""

    line: tuple[str, ...]
    """After `ecdit`, without a folder of the user's own."""
    name: str
    """Of the job."""
    gpus: int
    """0: it needs none."""
    ranks: bool
    """Whether it is done by ranks, one for each GPU."""
    takes_config_dir: bool
    parts: int | None = None
    """Tasks of an array, each told its `--part`."""
    after: tuple[str, ...] = ()

    def folder(self) -> Path:
        """A new one under runs/jobs."""
        stem = JOBS / f"{self.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        return next(path for n in range(1000) if not (path := Path(f"{stem}-{n}" if n else stem)).exists())


def compose_task(cfg: RunConfig, task: Task, *, named: frozenset[str], folder: Path) -> Job:
    """Everything that is written and submitted; writes nothing. `named`: keys that the command line names.

    Raises:
        ConfigError: a word holds a secret, the code does, or a path cannot stand in a script.
        RunFolderError: the folder holds another job.
    """
    if (folder / JOB_SCRIPT).exists():
        raise RunFolderError(f"{folder} holds another job; choose another folder, or leave --folder out")
    _refuse_secrets([*task.line, *folder.parts])
    place, snapshot = folder.absolute(), take(config_dir=cfg.config_dir)
    cluster = one_node(cfg.cluster, task, named=named)
    cfg = replace(cfg, experiment=task.name, cluster=replace(cluster, mounts=_mounts(cluster, task.line)))
    there, problems, notes = look_at_cluster(cfg)
    words = [*task.line, *(snapshot.words(place) if task.takes_config_dir else ())]
    words += ["--part", f"{TASK}/{task.parts}"] if task.parts else []
    if task.ranks and task.gpus > 1:
        words = ["--nproc", str(task.gpus), *words]
    code = str(snapshot.folder(place))
    files = description.describe(cfg, run=str(place), code=code, cwd=os.getcwd(), words=words)
    return Job(
        cfg=cfg,
        run=place,
        snapshot=snapshot,
        script=render(
            cfg, run=str(place), code=code, job_python=cluster.job_python or sys.executable, cwd=os.getcwd(), task=True
        ),
        files=files,
        problems=tuple(problems),
        notes=tuple(notes),
        cluster=there,
        freezes=False,
    )


def one_node(cluster: ClusterConfig, task: Task, *, named: frozenset[str]) -> ClusterConfig:
    """What a command asks for. The file's figures are about training on whole nodes: of them only those count that are named."""
    if "cluster.nodes" in named and cluster.nodes != 1:
        raise ConfigError(Problem(field="cluster.nodes", value=cluster.nodes, rule="is one for a command", nearest=1))
    if "cluster.array" in named:
        raise ConfigError(Problem(field="cluster.array", value=cluster.array, rule="is --array N for a command"))
    if "cluster.gpus_per_node" in named:
        rule = "is --nproc N for a command that draws, and none for any other"
        raise ConfigError(Problem(field="cluster.gpus_per_node", value=cluster.gpus_per_node, rule=rule))
    gpus = max(task.gpus, 1)
    gpu = cluster.gpu if task.gpus else "cpu"
    flags = [re.sub(r"^(gres=gpu(?::[A-Za-z]\w*)?)(?::\d+)?$", rf"\g<1>:{gpus}", flag) for flag in cluster.sbatch]
    return replace(
        cluster,
        nodes=1,
        gpus_per_node=gpus,
        gpu=gpu,
        exclusive=cluster.exclusive if "cluster.exclusive" in named else False,
        mem=cluster.mem if "cluster.mem" in named else None,
        array=f"1-{task.parts}" if task.parts else None,
        sbatch=tuple(flag for flag in flags if gpu != "cpu" or not flag.startswith("gres=gpu")),
    )


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """A job that Slurm has taken."""

    job: int
    what: str
    log: str

    def text(self) -> str:
        return (
            f"job {self.job} submitted: {self.what}\n"
            f"  log          {self.log}\n"
            f"  how it goes  squeue --jobs {self.job}\n"
            f"  take it out  scancel {self.job}"
        )


def submit_task(job: Job, task: Task) -> Submitted:
    """Raises ConfigError for what the cluster cannot give, SubmitError and StorageError as `launch` does."""
    number = hand_in(job, after=task.after)
    log = log_path(job.cfg, run=str(job.run), job=number)
    return Submitted(job=number, what=f"ecdit {shlex.join(task.line)}", log=log)


def _refuse_secrets(line: Sequence[str]) -> None:
    """A command line is written down, as a configuration is."""
    found = [(word.partition("=")[0], what) for word in line if (what := form_of(word)) is not None]
    if found:
        raise ConfigError([
            Problem(field=key if len(key) < 30 and form_of(key) is None else "a word", value="...", rule=f"holds {what}; {INSTEAD}")
            for key, what in found
        ])  # fmt: skip


def _mounts(cluster: ClusterConfig, line: Sequence[str]) -> tuple[str, ...]:
    """For a container: besides the working directory, what the command's words name elsewhere, and where that leads."""
    if cluster.container is None:
        return cluster.mounts
    here, found = os.path.realpath(os.getcwd()), list(cluster.mounts)
    for word in line:
        path = Path(word.partition("=")[2] or word)
        while path.is_absolute() and not path.exists() and path != path.parent:
            path = path.parent
        if path.exists() and str(path) != "/":
            place = os.path.realpath(path)
            if not f"{place}/".startswith(f"{here}/") and not set(place) & set(':,"'):
                found += [place] if place not in found else []
    return tuple(found)

"""The sbatch script of a run, from `job.sh.template`. A pure function of the configuration and where things lie."""

from __future__ import annotations

import re
import shlex
from importlib import resources
from string import Template

from ecdit_train.config.cluster import ClusterConfig
from ecdit_train.config.cluster_rules import gpu_request
from ecdit_train.config.schema import RunConfig
from ecdit_train.errors import EXIT_REQUEUE, ConfigError, Problem, StorageError
from ecdit_train.run_folder import LOGS

RUN_COMMENT = """# Written by `ecdit launch` for the run in {run}; launch again instead of editing it.
# The supervisor reads job.json beside it, and every life resolved.yaml, so this script carries no setting of the training."""
TASK_COMMENT = """# Written by `ecdit submit` in {run}; submit again instead of editing it.
# What is run is in job.json beside it."""
MODULES = "/etc/profile.d/modules.sh /etc/profile.d/lmod.sh /etc/profile.d/z00_lmod.sh"
"""Where `module` comes from, in a shell that did not inherit it."""
TRIES = 20
"""Attempts of a job after which a batch host that lacks what it needs (a mount, the run folder, Python) ends it."""
PAUSE_SECONDS = 60
"""Before such a job goes back into the queue."""


def render(cfg: RunConfig, *, run: str, code: str | None, job_python: str, cwd: str, task: bool = False) -> str:
    """The job script.

    Args:
        cfg: a validated configuration; only `experiment` and `cluster` are read.
        run: where `resolved.yaml` and `job.json` lie, absolute.
        code: the code snapshot, absolute; None runs the installed package.
        job_python: interpreter of the supervisor on the job's first node.
        cwd: where the job works, absolute: the folder that it was launched from.
        task: whether the job is one command (`launch.task`), not a run.

    Raises:
        ConfigError: a path cannot stand in a script.
    """
    if re.search(r'[\n"\\]', run):
        raise ConfigError(Problem(field="run", value=run, rule='must not contain a newline, " or \\'))
    template = (resources.files("launch") / "job.sh.template").read_text(encoding="utf-8")
    return Template(template).substitute(
        comment=(TASK_COMMENT if task else RUN_COMMENT).format(run=run),
        module="launch.task" if task else "launch.job",
        directives="\n".join(f"#SBATCH --{line}" for line in _directives(cfg, run=run)),
        setup="".join(f"{line}\n" for line in _setup(cfg.cluster)),
        run=shlex.quote(run),
        code=shlex.quote(code or ""),
        cwd=shlex.quote(cwd),
        tries=TRIES,
        pause=PAUSE_SECONDS,
        code_requeue=EXIT_REQUEUE,
        code_storage=StorageError.exit_code,
        lead=cfg.cluster.signal_lead,
        job_python=shlex.quote(job_python),
    )


def job_name(cfg: RunConfig) -> str:
    """The experiment's name without signs that Slurm's file names cannot hold."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", cfg.experiment)


def log_path(cfg: RunConfig, *, run: str, job: int) -> str:
    """Where a job's log will lie; of an array, where those of its jobs will, as a pattern."""
    return f"{run}/{LOGS}/{job_name(cfg)}-{'*' if cfg.cluster.array else job}.out"


def _directives(cfg: RunConfig, *, run: str) -> list[str]:
    """The #SBATCH lines; those about nothing are left out."""
    cluster = cfg.cluster
    log = run.replace("%", "%%") + f"/{LOGS}/%x-%j.out"
    typed = gpu_request(cluster)[1]  # --gres asks for them by type
    lines = [
        f"job-name={job_name(cfg)}",
        f"nodes={cluster.nodes}",
        "ntasks-per-node=1",
        None if cluster.gpu == "cpu" or typed else f"gpus-per-node={cluster.gpus_per_node}",
        f"cpus-per-task={cluster.cpus_per_gpu * cluster.gpus_per_node}",
        f"time={cluster.time_limit}",
        *(
            f"{name.replace('_', '-')}={value}"
            for name in ("partition", "account", "qos", "mem", "exclude", "constraint", "reservation", "dependency")
            if (value := getattr(cluster, name)) is not None
        ),
        "exclusive" if cluster.exclusive else None,
        *(f"{n.replace('_', '-')}={v}" for n in ("array", "mail_user", "mail_type") if (v := getattr(cluster, n))),
        f'output="{log}"' if re.search(r"[^\w./%@:+=,-]", log) else f"output={log}",
        "open-mode=append",
        f"signal=B:USR2@{cluster.signal_lead}",
        "requeue",
        *cluster.sbatch,
    ]
    return [line for line in lines if line is not None]


def _setup(cluster: ClusterConfig) -> list[str]:
    """Modules and exports, with a blank line before each block."""
    lines: list[str] = []
    if cluster.modules:
        begin = [
            f"type module >/dev/null 2>&1 || for init in {MODULES}; do",
            "  # shellcheck source=/dev/null",
            '  if [[ -r $init ]]; then . "$init"; fi',
            "done",
        ]
        loads = [f"module load {shlex.quote(module)}" for module in cluster.modules]
        lines += ["", "set +u  # module scripts read unset variables", *begin, *loads, "set -u"]
    if cluster.env:
        lines.append("")
        for entry in cluster.env:
            name, _, value = entry.partition("=")
            lines.append(f"export {name}={shlex.quote(value)}")
    return lines

"""The sbatch script of a run, from `job.sh.template`. A pure function of the configuration and the run folder."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from string import Template

from ecdit_train.config.cluster_rules import is_secret_name
from ecdit_train.config.schema import ClusterConfig, RunConfig
from ecdit_train.config.validate import slots_of
from ecdit_train.errors import ConfigError, Problem


def render(cfg: RunConfig, *, run_folder: str | Path, overrides: Sequence[str] = (), python: str = "python") -> str:
    """The job script.

    Args:
        cfg: a validated configuration; only `experiment`, `cluster` and local paths are read.
        run_folder: where `resolved.yaml` lies; made absolute, since a job may start elsewhere.
        overrides: words appended to the `resume` command of every attempt of the job (usually none).
        python: interpreter on the nodes.

    Raises:
        ConfigError: an environment entry is named like a secret, or a path cannot stand in a script.
    """
    cluster = cfg.cluster
    _refuse_secrets(cluster)
    run = str(Path(run_folder).absolute())
    if re.search(r'[\n"\\]', run):
        raise ConfigError(Problem(field="run", value=run, rule='must not contain a newline, " or \\'))
    template = (resources.files("launch") / "job.sh.template").read_text(encoding="utf-8")
    return Template(template).substitute(
        run_comment=run,
        directives="\n".join(f"#SBATCH --{line}" for line in _directives(cfg, run=run)),
        setup="".join(f"{line}\n" for line in _setup(cluster)),
        run=shlex.quote(run),
        lead=cluster.signal_lead,
        job_python=shlex.quote(python),
        code=shlex.quote(""),
    )


def _config_dir(cfg: RunConfig) -> tuple[str, ...]:
    """Named again in every attempt: whoever submits the run trusts the folder, also one that belongs to a colleague."""
    return ("--config-dir", cfg.config_dir) if cfg.config_dir else ()


def job_name(cfg: RunConfig) -> str:
    """The experiment's name without signs that Slurm's file names cannot hold."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", cfg.experiment)


def _refuse_secrets(cluster: ClusterConfig) -> None:
    rule = "looks like a secret; export it in your shell or read it from a 0600 file"
    names = [entry.partition("=")[0] for entry in cluster.env]
    problems = [Problem(field="cluster.env", value=f"{n}=...", rule=rule) for n in names if is_secret_name(n)]
    if problems:
        raise ConfigError(problems)


def _directives(cfg: RunConfig, *, run: str) -> list[str]:
    """The #SBATCH lines; those about nothing are left out."""
    cluster = cfg.cluster
    log = run.replace("%", "%%") + "/logs/%x-%j.out"
    lines = [
        f"job-name={job_name(cfg)}",
        f"nodes={cluster.nodes}",
        "ntasks-per-node=1",
        None if cluster.gpu == "cpu" else f"gpus-per-node={cluster.gpus_per_node}",
        f"cpus-per-task={_cpus(cluster)}",
        f"time={cluster.time_limit}",
        f"partition={cluster.partition}" if cluster.partition else None,
        f"account={cluster.account}" if cluster.account else None,
        f"qos={cluster.qos}" if cluster.qos else None,
        f'output="{log}"' if re.search(r"[^\w./%@:+=,-]", log) else f"output={log}",
        "open-mode=append",
        f"signal=B:USR2@{cluster.signal_lead}",
        "requeue",
    ]
    return [line for line in lines if line is not None]


def _cpus(cluster: ClusterConfig) -> int:
    return cluster.cpus_per_gpu * cluster.gpus_per_node


def _setup(cluster: ClusterConfig) -> list[str]:
    """Modules and exports, with a blank line before each block."""
    lines: list[str] = []
    if cluster.modules:
        loads = [f"module load {shlex.quote(module)}" for module in cluster.modules]
        lines += ["", "set +u  # module scripts read unset variables", *loads, "set -u"]
    if cluster.env:
        lines.append("")
        for entry in cluster.env:
            name, _, value = entry.partition("=")
            lines.append(f"export {name}={shlex.quote(value)}")
    return lines


def _srun_options(cfg: RunConfig) -> list[str]:
    """srun's own flags; a container sees the working directory, the run folder and absolute data paths."""
    cluster = cfg.cluster
    options = [f"--cpus-per-task={_cpus(cluster)}", "--kill-on-bad-exit=1"]
    if cluster.container:
        paths = [cfg.data.shards, cfg.config_dir, *(p for slot in slots_of(cfg).values() for p in slot.paths())]
        inside = dict.fromkeys(p for p in paths if p is not None and p.startswith("/"))
        mounts = ",".join(['"$PWD:$PWD"', '"$run:$run"', *(shlex.quote(f"{p}:{p}") for p in inside)])
        options += [
            f"--container-image={shlex.quote(cluster.container)}",
            f"--container-mounts={mounts}",
            '--container-workdir="$PWD"',
        ]
    return options

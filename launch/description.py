"""`job.json`: what the supervisor of a job is told (`launch.job` reads it). Paths are absolute, and nothing in it is a shell's.

run                the run folder
code               the code snapshot, first on the path of supervisor and ranks
python             the ranks' interpreter
srun               further options of every step
nodes, ranks_per_node, gpu
words              after `ecdit resume RUN`
lead               seconds from Slurm's warning to the time limit
lives              {without_progress, total, back_off: seconds before each try in a row}
bad_node           exclude | drain | keep
interface          between nodes; null: found
preflight          {gpus a node, free_bytes, clock_seconds, bandwidth: bytes/s or 0, folders that the ranks must see}
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ecdit_train.config.schema import RunConfig
from ecdit_train.config.validate import slots_of
from ecdit_train.run_folder import RANKS_SCRIPT
from launch.mounts import as_flag, mounts

CLOCK_SECONDS = 5.0
"""How far apart the clocks of two nodes may be: file times and journals are compared by people."""
CHECKPOINTS_FREE = 2.0
"""Checkpoints that the run folder's disk must hold before the first step, where their size is known."""


@dataclass(frozen=True, kw_only=True)
class JobFiles:
    """Contents of the files beside the script."""

    description: dict[str, Any]
    """Of job.json."""
    ranks: str | None
    """Of ranks.sh; None where an interpreter's name is enough."""

    @property
    def text(self) -> str:
        return json.dumps(self.description, indent=1) + "\n"


def describe(
    cfg: RunConfig,
    *,
    run: str,
    code: str | None,
    cwd: str,
    words: Sequence[str] = (),
    checkpoint_bytes: float = 0.0,
    python: str | None = None,
) -> JobFiles:
    """What the supervisor is told.

    Args:
        cfg: a validated configuration.
        run: the run folder, absolute.
        code: the code snapshot, absolute; None runs the installed package.
        cwd: where relative paths of the configuration start, absolute.
        words: after `ecdit resume RUN`.
        checkpoint_bytes: of one checkpoint; 0 where it is not known.
        python: this interpreter, if it is not to be asked for.

    Raises:
        ConfigError: a path that no container can be told.
    """
    cluster = cfg.cluster
    interpreter = cluster.python or ("python" if cluster.container else python or sys.executable)
    srun = [f"--cpus-per-task={cluster.cpus_per_gpu * cluster.gpus_per_node}"]
    ranks = None
    if cluster.container is not None:
        seen = mounts(cfg, run=run, cwd=cwd)
        if cluster.container_kind == "pyxis":
            srun += [f"--container-image={cluster.container}", f"--container-mounts={as_flag(seen)}"]
            srun += [f"--container-workdir={cwd}"]
        else:
            inside = ["apptainer", "exec", *(["--nv"] if cluster.gpu != "cpu" else []), "--bind", as_flag(seen)]
            command = shlex.join([*inside, "--pwd", cwd, cluster.container, interpreter])
            ranks = f'#!/usr/bin/env bash\n# Python inside the image, for the ranks.\nexec {command} "$@"\n'
            interpreter = f"{run}/{RANKS_SCRIPT}"
    data = [source.shards for source in cfg.data.named.values()]
    folders = [*data, *(path for slot in slots_of(cfg).values() for path in slot.paths())]
    description: dict[str, Any] = {
        "format": 1,
        "run": run,
        "code": code,
        "python": interpreter,
        "srun": srun,
        "nodes": cluster.nodes,
        "ranks_per_node": cluster.gpus_per_node,
        "gpu": cluster.gpu != "cpu",
        "words": list(words),
        "lead": cluster.signal_lead,
        "lives": {
            "without_progress": cluster.lives_without_progress,
            "total": cluster.lives,
            "back_off": list(cluster.back_off),
        },
        "bad_node": cluster.bad_node,
        "interface": cluster.interface,
        "preflight": {
            "gpus": 0 if cluster.gpu == "cpu" else cluster.gpus_per_node,
            "free_bytes": int(CHECKPOINTS_FREE * checkpoint_bytes),
            "clock_seconds": CLOCK_SECONDS,
            "bandwidth": cluster.preflight_bandwidth,
            "folders": [run, *dict.fromkeys(os.path.normpath(os.path.join(cwd, path)) for path in folders)],
        },
    }
    return JobFiles(description=description, ranks=ranks)

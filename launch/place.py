"""Where the ranks of this machine stand among those of several machines: from Slurm, or as somebody says by hand."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from ecdit_train.errors import ConfigError, Problem


@dataclass(frozen=True, kw_only=True)
class Place:
    """One machine of `nodes`. Rank = node * ranks of a node + local rank."""

    node: int
    nodes: int
    address: str
    """Of the first machine, where the ranks meet."""
    port: int


def find(nodes: int, *, environ: Mapping[str, str] = os.environ) -> Place:
    """NODE_RANK, MASTER_ADDR and MASTER_PORT where they are set, else what Slurm says of this step.

    Raises ConfigError: not one task on each of `nodes` machines, or nobody says which this is or where to meet.
    """
    by_hand = "NODE_RANK" in environ
    told = environ.get("NODE_RANK", environ.get("SLURM_NODEID", "0" if nodes == 1 else ""))
    if not told.isdecimal() or int(told) >= nodes:
        rule = f"must be the number of this machine, 0 to {nodes - 1}: set NODE_RANK, or start it by srun"
        raise ConfigError(Problem(field="NODE_RANK", value=told, rule=rule))
    step = environ.get("SLURM_STEP_NUM_NODES", environ.get("SLURM_NNODES", str(nodes)))
    if not by_hand and step != str(nodes):
        rule = f"the step has {step} nodes: srun --nodes={nodes}"
        raise ConfigError(Problem(field="--nodes", value=nodes, rule=rule, nearest=int(step)))
    if not by_hand and environ.get("SLURM_LOCALID", "0") != "0":
        rule = "this launcher starts all ranks of its node: srun --ntasks-per-node=1"
        raise ConfigError(Problem(field="SLURM_LOCALID", value=environ["SLURM_LOCALID"], rule=rule, nearest=0))
    address = environ.get("MASTER_ADDR") or ("127.0.0.1" if nodes == 1 else _first_host(environ))
    port = environ.get("MASTER_PORT") or str(port_of(environ.get("SLURM_JOB_ID", ""), life=_attempt(environ)))
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(Problem(field="MASTER_PORT", value=port, rule="must be a port, 1 to 65535"))
    return Place(node=int(told), nodes=nodes, address=address, port=int(port))


def port_of(job: str, *, life: int) -> int:
    """Where the ranks of a life meet: another port for each life of a job and for its neighbours, below those that the
    system gives to connections."""
    return 20000 + (int(job) * 8 + life if job.isdecimal() else life) % 10000


def _attempt(environ: Mapping[str, str]) -> int:
    return int(environ.get("SLURM_RESTART_COUNT") or 0)


def _first_host(environ: Mapping[str, str]) -> str:
    names = environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_JOB_NODELIST", ""))
    if names and not set(names) & set("[,"):
        return names
    hosts = expand(names) if names else []
    if not hosts:
        rule = "must name the first machine: set it (and MASTER_PORT), or start this by srun where scontrol is"
        raise ConfigError(Problem(field="MASTER_ADDR", value=None, rule=rule))
    return hosts[0]


def expand(names: str, *, seconds: float = 60.0) -> list[str]:
    """The hosts of Slurm's `n[1-3,7]`, in its order; by our own reading where `scontrol` is not there or does not answer."""
    try:
        command = ["scontrol", "show", "hostnames", names]
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
        found = done.stdout.split() if done.returncode == 0 else []
    except (OSError, subprocess.TimeoutExpired):
        found = []
    return found or spelled_out(names)


def spelled_out(names: str) -> list[str]:
    """`n[1-3,7],m[01-02]x[1-2]` as hosts, the last numbers running fastest; zeros in front count. None where it is no such list."""
    hosts: list[str] = []
    for one in re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", names):
        choices = [_numbers(part[1:-1]) if part[0] == "[" else [part] for part in re.findall(r"\[[^\]]*\]|[^\[]+", one)]
        hosts += ["".join(parts) for parts in itertools.product(*choices)]
    return hosts


def _numbers(ranges: str) -> list[str]:
    """Of `1-3,07`."""
    found: list[str] = []
    for one in ranges.split(","):
        first, _, last = one.partition("-")
        if not first.isdecimal() or not (last or first).isdecimal():
            return []
        found += [f"{n:0{len(first)}d}" for n in range(int(first), int(last or first) + 1)]
    return found

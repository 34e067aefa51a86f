"""RUN/job.json: what the supervisor of a job is told. Written by `ecdit launch`, read by `launch.job`.

Standard library only, and no torch: the supervisor may run on a bare Python of the batch host, outside the ranks' container.
"""

from __future__ import annotations

import json
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from ecdit_train.errors import ConfigError, Problem

FORMAT = 1
BAD_NODE = ("exclude", "drain", "keep")


@dataclass(frozen=True, kw_only=True)
class Lives:
    """How often a run is started again."""

    without_progress: int
    """Lives in a row without a newer committed checkpoint, after which somebody must look (exit code 76)."""
    total: int
    back_off: tuple[float, ...]
    """Seconds before the next life after the first, second ... one without progress; the last one stays."""


@dataclass(frozen=True, kw_only=True)
class Checks:
    """What every node must have before a life."""

    gpus: int
    free_bytes: int
    """Of the run folder's file system; 0: not looked at."""
    clock_seconds: float
    """Most that a node's clock may differ."""
    bandwidth: float
    """Bytes/s that an all-reduce must move; 0: not measured."""
    folders: tuple[str, ...]
    """Absolute; each must be there, the first (the run folder) writable."""


@dataclass(frozen=True, kw_only=True)
class JobFile:
    """The job, whole."""

    run: str
    code: str | None
    """Folder that every life imports ecdit from; None: the installed package."""
    python: str
    """The ranks' interpreter."""
    srun: tuple[str, ...]
    """Further options of every step."""
    nodes: int
    ranks_per_node: int
    gpu: bool
    words: tuple[str, ...]
    """After `resume RUN`."""
    lead: int
    """Seconds from Slurm's warning to the time limit."""
    lives: Lives
    bad_node: str
    interface: str | None
    preflight: Checks


def read(path: Path) -> JobFile:
    """Raises ConfigError for what is not such a file, with every problem in it."""
    try:
        tree = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}; write it anew: ecdit launch") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}); write it anew: ecdit launch") from error
    if not isinstance(tree, dict) or tree.pop("format", None) != FORMAT:
        raise ConfigError(f"{path} is not a job file of format {FORMAT}; write it anew with this version: ecdit launch")
    problems: list[Problem] = []
    job = _take(JobFile, tree, at="", problems=problems)
    if not problems:
        counts = {"nodes": job.nodes, "ranks_per_node": job.ranks_per_node, "lives.total": job.lives.total}
        counts["lives.without_progress"] = job.lives.without_progress
        problems += [
            Problem(field=k, value=v, rule="must be at least 1", nearest=1) for k, v in counts.items() if v < 1
        ]
        if job.bad_node not in BAD_NODE:
            rule = f"must be one of {', '.join(BAD_NODE)}"
            problems.append(Problem(field="bad_node", value=job.bad_node, rule=rule, nearest="exclude"))
    if problems:
        raise ConfigError(f"{path} is damaged; write it anew (ecdit launch): " + "; ".join(map(str, problems)))
    return job


_KINDS: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "str | None": (str, type(None)),
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
}


def _take(kind: Any, tree: dict[str, Any], *, at: str, problems: list[Problem]) -> Any:
    """`tree` as a `kind`; unusable where a problem was added."""
    values: dict[str, Any] = {}
    for field in fields(kind):
        name, value = f"{at}{field.name}", tree.get(field.name, MISSING)
        nested = {"Lives": Lives, "Checks": Checks}.get(str(field.type))
        if value is MISSING:
            problems.append(Problem(field=name, value=None, rule="is missing"))
        elif nested is not None and isinstance(value, dict):
            values[field.name] = _take(nested, value, at=f"{name}.", problems=problems)
        elif str(field.type).startswith("tuple"):
            kinds = (str,) if "str" in str(field.type) else (int, float)
            if isinstance(value, list) and all(type(v) in kinds for v in value):
                values[field.name] = tuple(value)
            else:
                problems.append(Problem(field=name, value=value, rule=f"must be a list ({field.type})"))
        elif nested is None and type(value) in _KINDS[str(field.type)]:
            values[field.name] = value
        else:
            problems.append(Problem(field=name, value=value, rule=f"must be {field.type}"))
    surplus = sorted(set(tree) - {field.name for field in fields(kind)})
    problems += [Problem(field=f"{at}{name}", value=tree[name], rule="is not a key of it") for name in surplus]
    return kind(**values) if len(values) == len(fields(kind)) else None

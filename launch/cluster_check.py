"""Whether the cluster can ever run the job: what the configuration asks for against what Slurm says there is. A job that asks for
more is accepted by many clusters, and pends for ever."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ecdit_train.config.cluster import ClusterConfig
from ecdit_train.config.cluster_rules import gpu_request, megabytes, seconds
from ecdit_train.config.nearest import closest
from ecdit_train.errors import Problem
from launch.cluster_facts import Cluster, Node, Partition, UnknownClusterError, clock, describe_gpus, hostnames

NOT_NODES = ("futr", "future", "unk", "powering_down")
"""States of nodes that are only names."""
AWAY = ("down", "drain", "drng", "drained", "fail", "maint", "boot", "reboot")


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What the job needs of every node."""

    cpus: int
    memory: float | None
    gpus: int
    gpu_type: str | None
    features: tuple[str, ...]
    """All of them; empty where the expression is more than `a&b`."""
    away: tuple[str, ...]
    """Nodes that it must not get."""

    def fits(self, node: Node) -> bool:
        return (
            node.cpus >= self.cpus
            and (self.memory is None or node.memory >= self.memory)
            and node.has_gpus(self.gpus, kind=self.gpu_type)
            and set(self.features) <= set(node.features)
            and node.name not in self.away
        )


def problems(config: ClusterConfig, cluster: Cluster, *, environ: Mapping[str, str] = os.environ) -> list[Problem]:
    """Everything that the cluster cannot give, each with what it has instead. `environ`: where sbatch looks for a partition."""
    return _look(config, cluster, environ=environ)[0]


def notes(config: ClusterConfig, cluster: Cluster, *, environ: Mapping[str, str] = os.environ) -> list[str]:
    """What is no reason to refuse the job, but may keep it waiting."""
    said = [f"Slurm may refuse this, or keep the job waiting: {p}" for p in _look(config, cluster, environ=environ)[1]]
    ask = _ask(config, cluster)
    for name in _named(config, environ) or _default(cluster):
        fitting = [node for node in cluster.of(name) if ask.fits(node) and not _only_a_name(node)]
        up = [node for node in fitting if not any(word in node.state for word in AWAY)]
        if len(fitting) >= config.nodes > len(up):
            said.append(
                f"partition {name}: {config.nodes} nodes are asked for, {len(up)} of {len(fitting)} that fit are up: the job waits"
            )
    return said


def _look(
    config: ClusterConfig, cluster: Cluster, *, environ: Mapping[str, str]
) -> tuple[list[Problem], list[Problem]]:
    """(what it cannot give, what it may give all the same)

    A job that names no partition may be sent to any (Slurm's job_submit plugins). A QOS may allow more than the partition does
    (its flags PartitionTimeLimit, PartitionMaxNodes, which not everybody may ask for).
    """
    hard, soft = list(_names(config, cluster)), list[Problem]()
    known, named = [p.name for p in cluster.partitions], _named(config, environ)
    best = _best(config, cluster)
    if unknown := [name for name in named if name not in known]:
        said_by = "" if config.partition else " (SBATCH_PARTITION)"
        rule = f"no partition {', '.join(unknown)} here{said_by}; there are {', '.join(known)}"
        near = closest(unknown[0], known) or best
        hard.append(Problem(field="cluster.partition", value=config.partition, rule=rule, nearest=near))
    if not named and not _default(cluster):
        rule = f"is needed: this cluster has no default partition; there are {', '.join(known)}"
        found = [Problem(field="cluster.partition", value=None, rule=rule, nearest=best)]
        return (hard, found) if best else (hard + found, soft)
    lifted = config.qos is not None or "SBATCH_QOS" in environ
    each = []
    for p in [p for name in named or _default(cluster) if (p := cluster.partition(name)) is not None]:
        limits, rest = list(_limits(config, p, cluster)), list(_partition(config, p, cluster))
        each.append((rest, limits) if lifted else (limits + rest, []))
    if each:  # of several partitions one is enough
        cannot, may = min(each, key=lambda one: (len(one[0]), len(one[1])))
        elsewhere = not named and best is not None
        hard += [] if elsewhere else cannot
        soft += [*cannot, *may] if elsewhere else may
    return hard, soft


def _named(config: ClusterConfig, environ: Mapping[str, str]) -> list[str]:
    """The partitions that sbatch is told; where the configuration names none it reads its own variable."""
    return [name for name in (config.partition or environ.get("SBATCH_PARTITION", "")).split(",") if name]


def _default(cluster: Cluster) -> list[str]:
    return [p.name for p in cluster.partitions if p.is_default][:1]


def _best(config: ClusterConfig, cluster: Cluster) -> str | None:
    """The first partition that could run the job."""
    fits = (p.name for p in cluster.partitions if not [*_limits(config, p, cluster), *_partition(config, p, cluster)])
    return next(fits, None)


def _ask(config: ClusterConfig, cluster: Cluster) -> Ask:
    """A feature that nobody has is a problem of its own, and no reason to call every node unfit."""
    known = {name for node in cluster.nodes for name in node.features}
    kind, number = gpu_request(config)
    simple = config.constraint and not set(config.constraint) & set("|[]()*")
    return Ask(
        cpus=config.cpus_per_gpu * config.gpus_per_node,
        memory=None if config.mem is None else megabytes(config.mem),
        gpus=0 if config.gpu == "cpu" else number or config.gpus_per_node,
        gpu_type=kind,
        features=tuple(known.intersection(features_of(config.constraint))) if config.constraint and simple else (),
        away=_away(config),
    )


def _away(config: ClusterConfig) -> tuple[str, ...]:
    if config.exclude is None:
        return ()
    try:
        return hostnames(config.exclude)
    except UnknownClusterError:
        return ()


def _names(config: ClusterConfig, cluster: Cluster) -> Iterator[Problem]:
    """Features, nodes and reservations that nobody here has."""
    features = sorted({name for node in cluster.nodes for name in node.features})
    for name in features_of(config.constraint or ""):
        if name not in features:
            rule = f"no node here has the feature {name}; there are {', '.join(features) or 'none'}"
            yield Problem(
                field="cluster.constraint", value=config.constraint, rule=rule, nearest=closest(name, features)
            )
    nodes = sorted({node.name for node in cluster.nodes})
    if strange := [name for name in _away(config) if name not in nodes]:
        rule = f"no node {', '.join(strange[:5])} here; there are {_few(nodes)}"
        yield Problem(field="cluster.exclude", value=config.exclude, rule=rule, nearest=closest(strange[0], nodes))
    reservations = cluster.reservations or ()
    for name in (config.reservation or "").split(","):
        if name and cluster.reservations is not None and name not in reservations:
            rule = f"no reservation {name} here; there are {', '.join(reservations) or 'none'}"
            near = closest(name, reservations)
            yield Problem(field="cluster.reservation", value=config.reservation, rule=rule, nearest=near)


def features_of(constraint: str) -> list[str]:
    """The names in sbatch's expression: `[rack1*2&rack2*2]|80gb` -> rack1, rack2, 80gb."""
    return re.findall(r"[^\s,&|()\[\]*]+", re.sub(r"\*\d+", "", constraint))


def _limits(config: ClusterConfig, p: Partition, cluster: Cluster) -> Iterator[Problem]:
    """What one partition does not allow, but to a QOS that may more."""
    where, elsewhere = f"partition {p.name}", [q for q in cluster.partitions if q.name != p.name]
    limit = seconds(config.time_limit)
    if p.limit is not None and limit is not None and limit > p.limit:
        longer = [q.name for q in elsewhere if q.limit is None or q.limit >= limit]
        rule = f"{where} allows {clock(p.limit)}" + (f"; more do {', '.join(longer)}" if longer else "")
        yield Problem(field="cluster.time_limit", value=config.time_limit, rule=rule, nearest=clock(p.limit))
    if p.max_nodes is not None and config.nodes > p.max_nodes:
        rule = f"{where} allows {p.max_nodes} nodes a job"
        yield Problem(field="cluster.nodes", value=config.nodes, rule=rule, nearest=p.max_nodes)


def _partition(config: ClusterConfig, p: Partition, cluster: Cluster) -> Iterator[Problem]:
    """What one partition cannot give."""
    where = f"partition {p.name}"
    if not p.is_up:
        rule = f"{where} is {p.fields.get('State', 'down')} and starts no jobs"
        yield Problem(field="cluster.partition", value=p.name, rule=rule)
    for key, what, value in (("account", "Accounts", config.account), ("qos", "Qos", config.qos)):
        if value is not None and not p.allows(what, value):
            allowed = ", ".join(p.listed(f"Allow{what}")) or f"all but {', '.join(p.listed(f'Deny{what}'))}"
            yield Problem(field=f"cluster.{key}", value=value, rule=f"{where} takes {allowed}")
    ask = _ask(config, cluster)
    if ask.memory is not None and p.max_memory is not None and ask.memory > p.max_memory:
        near = f"{int(p.max_memory)}M"
        yield Problem(field="cluster.mem", value=config.mem, rule=f"{where} allows {near} a node", nearest=near)
    yield from _nodes(config, ask, [n for n in cluster.of(p.name) if not _only_a_name(n)], where=where)


def _nodes(config: ClusterConfig, ask: Ask, nodes: list[Node], *, where: str) -> Iterator[Problem]:
    """Whether enough nodes have what is asked of each; every quantity that no node has, by itself."""
    if not nodes:
        yield Problem(field="cluster.partition", value=config.partition, rule=f"{where} has no nodes")
        return
    before = len(short := list(_quantities(config, ask, nodes, where=where)))
    yield from short
    fitting = [node for node in nodes if ask.fits(node)]
    if len(fitting) < config.nodes and not (before and not fitting):
        left = f", {len(set(ask.away) & {n.name for n in nodes})} of them excluded" if ask.away else ""
        rule = f"{where} has {len(nodes)} node{'s' * (len(nodes) != 1)}{left}"
        if len(fitting) < len(nodes):
            rule += f", and {len(fitting)} of them can take this job"
        yield Problem(field="cluster.nodes", value=config.nodes, rule=rule, nearest=len(fitting) or None)
    elif before and len(nodes) < config.nodes:
        yield Problem(
            field="cluster.nodes", value=config.nodes, rule=f"{where} has {len(nodes)} nodes", nearest=len(nodes)
        )


def _quantities(config: ClusterConfig, ask: Ask, nodes: list[Node], *, where: str) -> Iterator[Problem]:
    cpus, memory = max(n.cpus for n in nodes), max(n.memory for n in nodes)
    if ask.cpus > cpus:
        rule = (
            f"times cluster.gpus_per_node = {config.gpus_per_node} asks for {ask.cpus} CPUs a node; {where} has {cpus}"
        )
        near = cpus // config.gpus_per_node or None
        yield Problem(field="cluster.cpus_per_gpu", value=config.cpus_per_gpu, rule=rule, nearest=near)
    if ask.memory is not None and ask.memory > memory:
        near_mem = f"{int(memory)}M"
        yield Problem(field="cluster.mem", value=config.mem, rule=f"{where} has {near_mem} a node", nearest=near_mem)
    if ask.gpus and not any(n.has_gpus(ask.gpus, kind=ask.gpu_type) for n in nodes):
        most = max(nodes, key=lambda n: sum(n.gpus.values())).gpus
        if ask.gpu_type is not None and not any(ask.gpu_type in n.gpus for n in nodes):
            kinds = sorted({kind for n in nodes for kind in n.gpus if kind})
            rule = f"{where} has no GPU {ask.gpu_type}; there are {', '.join(kinds) or 'none with a name'}"
            yield Problem(field="cluster.sbatch", value=f"gres=gpu:{ask.gpu_type}", rule=rule)
            return
        rule = f"{where} has {describe_gpus(most)} a node" + ("" if most else "; cluster.gpu=cpu asks for none")
        near_gpus = sum(most.values()) or None
        yield Problem(field="cluster.gpus_per_node", value=config.gpus_per_node, rule=rule, nearest=near_gpus)


def _only_a_name(node: Node) -> bool:
    return node.state.rstrip("*~#!%$@^-+") in NOT_NODES


def _few(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 8 else f"{', '.join(names[:6])} ... {names[-1]} ({len(names)})"

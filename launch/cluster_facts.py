"""What Slurm says of the cluster: its partitions and nodes, read from the text of `scontrol` and `sinfo` (Slurm 22.05 to 25, where
the fields that are read here print alike; the JSON of these commands changes with every release)."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field

from ecdit_train.config.cluster_rules import gpus_of, seconds_of

SECONDS = 30.0
"""How long a controller may take to answer; a busy one is no reason not to submit."""
NODES = "%N|%R|%c|%m|%G|%f|%t"
"""Of `sinfo -N`: one line for each node and partition."""


class UnknownClusterError(Exception):
    """Slurm is not here or does not answer; says which."""


@dataclass(frozen=True, kw_only=True)
class Partition:
    """One partition, as `scontrol show partition` has it."""

    name: str
    is_default: bool
    is_up: bool
    limit: int | None
    """Seconds that a job may run; None for unlimited."""
    max_nodes: int | None
    max_memory: float | None
    """MB per node that a job may ask for."""
    fields: Mapping[str, str]

    def allows(self, what: str, name: str) -> bool:
        """Whether an account or QOS (`what`: Accounts, Qos) may use it. Slurm keeps these names in small letters."""
        allowed, denied = ([one.lower() for one in self.listed(f"{how}{what}")] for how in ("Allow", "Deny"))
        return (not allowed or name.lower() in allowed) and name.lower() not in denied

    def listed(self, key: str) -> tuple[str, ...]:
        value = self.fields.get(key, "ALL")
        return () if value in ("ALL", "(null)", "N/A", "") else tuple(value.split(","))


@dataclass(frozen=True, kw_only=True)
class Node:
    """One node in one partition."""

    name: str
    partition: str
    cpus: int
    memory: float
    """MB."""
    gpus: Mapping[str, int]
    """Type ("" where it has none) -> how many."""
    features: tuple[str, ...]
    state: str

    def has_gpus(self, number: int, *, kind: str | None) -> bool:
        return (sum(self.gpus.values()) if kind is None else self.gpus.get(kind, 0)) >= number


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """All that was asked."""

    partitions: tuple[Partition, ...]
    nodes: tuple[Node, ...]
    reservations: tuple[str, ...] | None = field(default=())
    """None: Slurm did not say."""

    def partition(self, name: str) -> Partition | None:
        return next((p for p in self.partitions if p.name == name), None)

    def of(self, partition: str) -> tuple[Node, ...]:
        return tuple(node for node in self.nodes if node.partition == partition)

    def lines(self) -> tuple[str, ...]:
        """What there is, for people: one line for each partition and kind of node."""
        found = []
        for p in self.partitions:
            kinds: dict[tuple[object, ...], int] = {}
            for n in self.of(p.name):
                kind = (n.cpus, round(n.memory / 1024), tuple(n.gpus.items()))
                kinds[kind] = kinds.get(kind, 0) + 1
            nodes = "; ".join(
                f"{many} node{'s' * (many != 1)} with {cpus} CPUs, {memory} GB, {describe_gpus(dict(gpus))}"  # type: ignore[call-overload]
                for (cpus, memory, gpus), many in kinds.items()
            )
            found.append(f"{p.name}{' (default)' * p.is_default}: {nodes or 'no nodes'}; limit {clock(p.limit)}")
        return tuple(found)


def describe_gpus(gpus: Mapping[str, int]) -> str:
    if not any(gpus.values()):
        return "no GPU"
    return " and ".join(f"{n} {kind + ' ' if kind else ''}GPU{'s' * (n != 1)}" for kind, n in gpus.items())


def clock(seconds: int | None) -> str:
    """As Slurm writes a time; "unlimited" for None."""
    if seconds is None:
        return "unlimited"
    days, rest = divmod(seconds, 86400)
    text = f"{rest // 3600:02d}:{rest % 3600 // 60:02d}:{rest % 60:02d}"
    return f"{days}-{text}" if days else text


def ask() -> Cluster:
    """The cluster that this machine's Slurm commands talk to.

    Raises:
        UnknownClusterError: there is no Slurm here, its controller does not answer, or says nothing of partitions.
    """
    partitions = tuple(
        found
        for line in output("scontrol", "-a", "show", "partition", "-o").splitlines()
        if (found := _partition(line))
    )
    nodes = tuple(node for line in output("sinfo", "-h", "-a", "-N", "-o", NODES).splitlines() if (node := _node(line)))
    if not partitions or not nodes:
        raise UnknownClusterError("Slurm names no partition with nodes")
    reservations = None
    with contextlib.suppress(UnknownClusterError):
        said = output("scontrol", "-a", "show", "reservation", "-o")
        reservations = tuple(re.findall(r"^ReservationName=(\S+)", said, re.MULTILINE))
    return Cluster(partitions=partitions, nodes=nodes, reservations=reservations)


def hostnames(expression: str) -> tuple[str, ...]:
    """`n3,n[7-9]` -> n3, n7, n8, n9. Raises UnknownClusterError where Slurm cannot read it."""
    return tuple(output("scontrol", "show", "hostnames", expression).split())


def output(*command: str) -> str:
    """What a Slurm command prints. Raises UnknownClusterError with what it said instead."""
    program = shutil.which(command[0])
    if program is None:
        raise UnknownClusterError(f"there is no {command[0]} on this machine")
    try:
        answer = subprocess.run(
            [program, *command[1:]], capture_output=True, text=True, timeout=SECONDS, check=False, errors="replace"
        )
    except subprocess.TimeoutExpired as error:
        raise UnknownClusterError(f"{command[0]} did not answer within {SECONDS:g} s") from error
    except OSError as error:
        raise UnknownClusterError(f"{command[0]} cannot be run: {error}") from error
    if answer.returncode != 0:
        said = (answer.stderr or answer.stdout).strip().splitlines() or [f"exit code {answer.returncode}"]
        raise UnknownClusterError(f"{command[0]} said: {said[-1]}")
    return answer.stdout


def _partition(line: str) -> Partition | None:
    fields = dict(re.findall(r"(\w+)=(\S*)", line))
    if "PartitionName" not in fields:
        return None
    memory = fields.get("MaxMemPerNode", "UNLIMITED")
    return Partition(
        name=fields["PartitionName"],
        is_default=fields.get("Default") == "YES",
        is_up=fields.get("State", "UP") == "UP",
        limit=seconds_of(fields.get("MaxTime", "UNLIMITED")),
        max_nodes=int(fields["MaxNodes"]) if fields.get("MaxNodes", "").isdecimal() else None,
        max_memory=float(memory) if memory.isdecimal() and memory != "0" else None,
        fields=fields,
    )


def _node(line: str) -> Node | None:
    parts = [part.strip() for part in line.split("|")]
    if len(parts) != 7:
        return None
    name, partition, cpus, memory, gres, features, state = parts
    return Node(
        name=name,
        partition=partition.rstrip("*"),
        cpus=int(re.match(r"\d*", cpus)[0] or 0),  # type: ignore[index]
        memory=float(re.match(r"\d*", memory)[0] or 0),  # type: ignore[index]
        gpus=gpus_of(gres),
        features=() if features == "(null)" else tuple(features.split(",")),
        state=state,
    )

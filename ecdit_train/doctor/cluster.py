"""Slurm: whether it is here, can run the job, and brings it back as `ecdit launch` counts on."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from ecdit_train.config.cluster import ClusterConfig
from ecdit_train.doctor.findings import Check, Finding, fail, ok, warning
from ecdit_train.errors import EXIT_REQUEUE
from launch import cluster_check, cluster_facts, record
from launch.cluster_facts import Cluster, UnknownClusterError

OLDEST = (20, 11)
"""What `srun --overlap` came with."""
LONG_SILENCE = 600.0
SECONDS = 4 * cluster_facts.SECONDS


def checks(config: ClusterConfig | None, *, run: Path | None) -> list[Check]:
    """`config`: None where no run is asked about."""
    busy = "slurmctld does not answer: sinfo, scontrol ping; ask the operators"
    return [Check(what="slurm", ask=lambda: slurm(config, run=run), seconds=SECONDS, hangs=busy)]


def slurm(config: ClusterConfig | None, *, run: Path | None) -> Iterator[Finding]:
    if shutil.which("sbatch") is None:
        yield ok("slurm", "not on this machine: ecdit train works, ecdit launch does not")
        return
    try:
        settings = settings_in(cluster_facts.output("scontrol", "show", "config"))
        facts = cluster_facts.ask()
    except UnknownClusterError as error:
        fix = (
            "is slurm.conf here, and does slurmctld answer? sinfo, scontrol ping; without it ecdit launch cannot submit"
        )
        yield warning("slurm", str(error), fix)
        return
    yield from version(settings)
    yield from partitions(config, facts)
    yield from coming_back(settings, facts, partition=config.partition if config else None)
    yield from lead(settings, config=config, run=run)


def settings_in(text: str) -> dict[str, str]:
    """`Key = value` lines of `scontrol show config`."""
    return {m[1]: m[2].strip() for m in re.finditer(r"^(\w+)\s*=[ \t]*(.*)$", text, flags=re.MULTILINE)}


def number(settings: Mapping[str, str], key: str) -> float | None:
    """Of `300 sec`; None where it is not said."""
    match = re.match(r"\d+", settings.get(key, ""))
    return float(match[0]) if match else None


def version(settings: Mapping[str, str]) -> Iterator[Finding]:
    said = settings.get("SLURM_VERSION", "")
    parts = tuple(int(part) for part in re.findall(r"\d+", said)[:2])
    found = f"{said or 'of an unknown version'}, cluster {settings.get('ClusterName', '?')}"
    if parts and parts < OLDEST:
        yield fail("slurm", found, "20.11 or later is needed (srun --overlap)")
    else:
        yield ok("slurm", found)


def partitions(config: ClusterConfig | None, facts: Cluster) -> Iterator[Finding]:
    """As `ecdit launch` asks before it submits."""
    if config is None:
        yield ok("partitions", "; ".join(facts.lines()))
        return
    problems = cluster_check.problems(config, facts)
    for problem in problems:
        near = f"{problem.field}={problem.nearest}" if problem.nearest is not None else "change it in the cluster file"
        yield fail("partitions", f"{problem.field} = {problem.value!r}: {problem.rule}", near)
    notes = cluster_check.notes(config, facts)
    for note in notes:
        yield warning("partitions", note, "sinfo -R says why nodes are down; wait, or ask for fewer (cluster.nodes)")
    if not problems and not notes:
        yield ok("partitions", f"{config.partition or 'the default one'} can run the job now or later")


def coming_back(settings: Mapping[str, str], facts: Cluster, *, partition: str | None) -> Iterator[Finding]:
    """Requeue, preemption, lost nodes: what Slurm does with a job of ours, and after how long."""
    requeue = settings.get("JobRequeue") != "0"
    yield ok(
        "requeue",
        "jobs may be put back into the queue" if requeue else "off by default, and our scripts ask for it (--requeue)",
    )
    listed = re.findall(r"\d+", settings.get("RequeueExit", ""))
    if str(EXIT_REQUEUE) in listed:
        found = f"RequeueExit holds {EXIT_REQUEUE}: a run that `ecdit stop` has stopped would be brought back"
        yield warning(
            "requeue", found, f"ask the operators to take {EXIT_REQUEUE} out, or scancel the job after ecdit stop"
        )
    names = {p.name: p for p in facts.partitions}
    chosen = names.get(partition or next((p.name for p in facts.partitions if p.is_default), ""))
    mode = (chosen.fields.get("PreemptMode", "") if chosen else "") or settings.get("PreemptMode", "OFF")
    where = f" in {chosen.name}" if chosen else ""
    if "CANCEL" in mode or "SUSPEND" in mode:
        said = (
            "ends a preempted job for good"
            if "CANCEL" in mode
            else "stops a preempted job's processes; its ranks may be held for hanging"
        )
        yield warning(
            "preemption",
            f"PreemptMode{where} is {mode}: it {said}",
            "another partition or QOS; else launch again after a preemption",
        )
    else:
        yield ok("preemption", f"PreemptMode{where} is {mode}")
    silence = number(settings, "SlurmdTimeout")
    if silence is not None and (silence == 0 or silence > LONG_SILENCE):
        found = (
            "Slurm never calls a silent node down"
            if silence == 0
            else f"a silent node is called down after {silence:g} s"
        )
        fix = "if a job's first node is lost, that is how long it takes to come back: ask the operators for SlurmdTimeout=300"
        yield warning("lost node", found, fix)
    elif silence is not None:
        yield ok(
            "lost node",
            f"a silent node is called down after {silence:g} s; of others than the first ours do not wait for that",
        )
    expires = re.search(r"cred_expire=(\d+)", settings.get("AuthInfo", ""))
    yield ok(
        "come back",
        f"a requeued job starts after {expires[1] if expires else 120} s at the earliest (AuthInfo=cred_expire)",
    )


def lead(settings: Mapping[str, str], *, config: ClusterConfig | None, run: Path | None) -> Iterator[Finding]:
    """The seconds that a stop has, against what one took in this run."""
    need = None if run is None else record.needed_lead(run)
    kill = number(settings, "KillWait")
    took = "no save has been measured yet" if need is None else f"a stop of this run may take {need:.0f} s"
    if config is not None:
        found = f"cluster.signal_lead is {config.signal_lead} s; {took}"
        if need is not None and need > config.signal_lead:
            yield warning("signal lead", found, f"cluster.signal_lead={-(-need // 10) * 10:.0f}")
        else:
            yield ok("signal lead", found)
    if kill is not None:
        found = f"after SIGTERM (scancel, preemption) processes have {kill:g} s; {took}"
        if need is not None and need > kill:
            fix = "ecdit stop instead of scancel; a preempted job loses what its last checkpoint has not (checkpoint.every_steps)"
            yield warning("kill wait", found, fix)
        else:
            yield ok("kill wait", found)

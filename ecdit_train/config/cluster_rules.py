"""Rules of a machine room: what goes into a job script must be well formed, said once, and never a secret."""

from __future__ import annotations

import re

from ecdit_train.config.cluster import ClusterConfig
from ecdit_train.config.nearest import closest
from ecdit_train.config.rules import Checker, short
from ecdit_train.config.schema import RunConfig
from ecdit_train.secrets import form_of, is_secret_name

OURS = {
    "job-name": "experiment",
    "nodes": "cluster.nodes",
    "ntasks": "cluster.nodes: one task a node starts its ranks",
    "ntasks-per-node": "cluster.gpus_per_node: one task a node starts its ranks",
    "gpus": "cluster.nodes and cluster.gpus_per_node",
    "gpus-per-node": "cluster.gpus_per_node",
    "gpus-per-task": "cluster.gpus_per_node",
    "cpus-per-task": "cluster.cpus_per_gpu",
    "cpus-per-gpu": "cluster.cpus_per_gpu",
    "time": "cluster.time_limit",
    "signal": "cluster.signal_lead",
    "partition": "cluster.partition",
    "account": "cluster.account",
    "qos": "cluster.qos",
    "mem": "cluster.mem",
    "exclusive": "cluster.exclusive",
    "exclude": "cluster.exclude",
    "constraint": "cluster.constraint",
    "reservation": "cluster.reservation",
    "dependency": "cluster.dependency",
    "array": "cluster.array",
    "mail-user": "cluster.mail_user",
    "mail-type": "cluster.mail_type",
    "output": "run: the log lies in its folder",
    "error": "run: the log lies in its folder",
    "open-mode": "run: every life appends to one log",
    "requeue": "nothing: a job always comes back",
    "no-requeue": "nothing: a job always comes back",
    "chdir": "the folder you launch from",
    "wrap": "nothing: the job's script is its own",
    "export": "cluster.env; what your shell exports comes along",
    "container-image": "cluster.container",
    "container-mounts": "cluster.mounts",
}
"""Flags of sbatch that the script sets itself -> the key that says it."""

_SHORT = {
    "J": "job-name", "N": "nodes", "n": "ntasks", "G": "gpus", "c": "cpus-per-task", "t": "time", "p": "partition",
    "A": "account", "q": "qos", "x": "exclude", "C": "constraint", "d": "dependency", "a": "array", "o": "output",
    "e": "error", "D": "chdir",
}  # fmt: skip

RATES = {
    "gpu_memory": (1e8, 1e13),
    "peak_flops": (1e8, 1e17),
    "peak_fp8_flops": (0.0, 1e17),
    "memory_bandwidth": (1e8, 1e15),
    "intra_bandwidth": (1e5, 1e14),
    "inter_bandwidth": (1e5, 1e14),
    "call_latency": (0.0, 1.0),
    "intra_latency": (0.0, 1.0),
    "inter_latency": (0.0, 1.0),
}
"""What a plan may compute with, least and most: a slip of the exponent would make a plan that nothing else stops."""

_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<hours>\d{1,2}):(?P<minutes>[0-5]\d):(?P<seconds>[0-5]\d)")
_ENV = re.compile(r"(?P<name>[A-Za-z_][A-Za-z0-9_]*)=(?P<value>[^\n]*)")
_PLAIN = re.compile(r"[^\s\"'`$;&|<>\\]+")
_WORDS = ("partition", "account", "qos", "container", "exclude", "reservation", "dependency", "mail_user",
          "mail_type", "interface")  # fmt: skip
_FORMS = {
    "mem": (r"\d+[KMGT]?", "must be a number with K, M, G or T, as 400G, or 0 for all of the node's", "0"),
    "constraint": (r"[\w.,+*&|()\[\]:=/@-]+", "must be features, as hbm80 or hbm80&ib, or null", None),
    "array": (
        r"[\d,:-]+%1",
        "must end in %1: its jobs share this run folder, so they run one after another; `-m` starts several runs",
        None,
    ),
}
_FLAG = re.compile(r"(?P<name>[a-z][a-z0-9-]*)(?:=(?P<value>[^\s\"'`$;<>\\]+))?")


def seconds(time_limit: str) -> int | None:
    """Seconds of a Slurm time HH:MM:SS or D-HH:MM:SS, or None if it is not one."""
    match = _TIME.fullmatch(time_limit)
    if match is None:
        return None
    days, hours, minutes, secs = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + secs


def seconds_of(text: str) -> int | None:
    """Of Slurm's `1-00:00:00`, `02:00:00`, `30:00` or `30` (minutes); None for UNLIMITED and what is no time."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        return None
    days, *rest = (None if part is None else int(part) for part in match.groups())
    given = [part for part in rest if part is not None]
    if days is not None or len(given) == 3:  # hours first
        hours, minutes, seconds = (*given, 0, 0)[:3]
    else:
        hours, minutes, seconds = 0, *(*given, 0)[:2]
    return (((days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def megabytes(mem: str) -> float | None:
    """Of a `--mem` value; None for 0, all of the node's."""
    factor = {"K": 1 / 1024, "M": 1.0, "G": 1024.0, "T": 1024.0**2}.get(mem[-1])
    return float(mem[:-1]) * factor if factor else float(mem) or None


def gpu_request(cluster: ClusterConfig) -> tuple[str | None, int]:
    """(type, number) of GPUs per node that `--gres=gpu:TYPE:N` among the further flags asks for; no type and 0 where none does."""
    asked = (gpus_of(flag.removeprefix("gres=")) for flag in cluster.sbatch if flag.startswith("gres="))
    return next(((kind or None, number) for gpus in asked for kind, number in gpus.items()), (None, 0))


def gpus_of(gres: str) -> dict[str, int]:
    """`gpu:h100:8(S:0-1),nvme:1` -> {"h100": 8}; `gpu:4` -> {"": 4}: GPUs by type in Slurm's notation."""
    found: dict[str, int] = {}
    for item in re.sub(r"\([^)]*\)", "", gres).split(","):
        name, *rest = item.split(":")
        if name == "gpu":
            number = int(rest.pop()) if rest and rest[-1].isdecimal() else 1
            kind = rest[0] if rest else ""
            found[kind] = found.get(kind, 0) + number
    return found


def check_cluster(cfg: RunConfig, check: Checker) -> None:
    """Appends what is wrong with `cfg.cluster`."""
    cluster = cfg.cluster
    check.at_least(1, [f"cluster.{n}" for n in ("nodes", "gpus_per_node", "cpus_per_gpu")])
    check.at_least(1, ["cluster.lives", "cluster.lives_without_progress"])
    check.at_least(0, ["cluster.signal_lead", "cluster.preflight_bandwidth"])
    for name, (least, most) in RATES.items():
        value = getattr(cluster, name)
        rule, nearest = (
            f"must be between {short(least)} and {short(most)}: no machine is beyond",
            min(max(value, least), most),
        )
        check.require(least <= value <= most, f"cluster.{name}", rule=rule, nearest=nearest)
    check.positive(["cluster.gemm_efficiency"])
    check.require(cluster.gemm_efficiency <= 1, "cluster.gemm_efficiency", rule="must not exceed 1", nearest=1.0)
    ok = bool(cluster.back_off) and min(cluster.back_off, default=0) >= 0
    check.require(
        ok, "cluster.back_off", rule="must be one or more seconds, none below 0", nearest="[15.0, 60.0, 240.0]"
    )
    limit = seconds(cluster.time_limit)
    if check.require(
        limit is not None, "cluster.time_limit", rule="must be HH:MM:SS or D-HH:MM:SS", nearest="1-00:00:00"
    ):
        assert limit is not None
        rule = f"must be below cluster.time_limit = {cluster.time_limit} ({limit} s)"
        check.require(cluster.signal_lead < limit, "cluster.signal_lead", rule=rule, nearest=max(limit // 10, 0))
    _check_words(cluster, check)
    for entry in cluster.env:
        _check_env(entry, check)
    for flag in cluster.sbatch:
        _check_flag(flag, cluster, check)


def _check_words(cluster: ClusterConfig, check: Checker) -> None:
    """Values that stand in a script as they are."""
    word = "must be one word without quotes or shell signs"
    for name in _WORDS:
        value = getattr(cluster, name)
        check.require(value is None or _PLAIN.fullmatch(value) is not None, f"cluster.{name}", rule=f"{word}, or null")
    for name, (form, rule, nearest) in _FORMS.items():
        value = getattr(cluster, name)
        ok = value is None or re.fullmatch(form, value) is not None
        check.require(ok, f"cluster.{name}", rule=rule, nearest=nearest)
    for module in cluster.modules:
        check.require(_PLAIN.fullmatch(module) is not None, "cluster.modules", shown=module, rule=word)
    for mount in cluster.mounts:
        ok = re.fullmatch(r"/[^:,\n\"'`$]*(:/[^:,\n\"'`$]*)?", mount) is not None
        check.require(ok, "cluster.mounts", shown=mount, rule="must be /outside:/inside, or /same")
    for name in ("python", "job_python"):
        value = getattr(cluster, name)
        ok = value is None or (bool(value) and "\n" not in value)
        check.require(ok, f"cluster.{name}", rule="must be the path of an interpreter, or null")


def _check_env(entry: str, check: Checker) -> None:
    """One NAME=value line; a secret's value is never printed."""
    match = _ENV.fullmatch(entry)
    if match is None:
        check.require(False, "cluster.env", shown=entry.partition("=")[0], rule="must be NAME=value on one line")
    elif is_secret_name(match["name"]):
        check.require(False, "cluster.env", shown=f"{match['name']}=...", rule=f"looks like a secret; {INSTEAD}")


def _check_flag(flag: str, cluster: ClusterConfig, check: Checker) -> None:
    """One further flag of sbatch."""
    bare = flag.lstrip("-")
    name, equals, value = bare.partition("=")
    if flag.startswith("-") or (equals and not value):
        rule = "must be name=value or name, without dashes before it"
        check.require(False, "cluster.sbatch", shown=flag, rule=rule, nearest=f"[{bare}]" if value else None)
        return
    if (key := OURS.get(_SHORT.get(name, name))) is not None:
        check.require(False, "cluster.sbatch", shown=flag, rule=f"is set by {key}")
    elif _FLAG.fullmatch(flag) is None:
        rule = "must be name=value or name, as sbatch's long flags, without spaces, quotes or shell signs"
        near = closest(name, OURS)
        check.require(False, "cluster.sbatch", shown=flag, rule=rule, nearest=near and OURS[near].partition(":")[0])
    elif name == "gres" and (number := gpu_request(cluster)[1]) not in (0, cluster.gpus_per_node):
        rule = f"must ask for cluster.gpus_per_node = {cluster.gpus_per_node} GPUs, not {number}"
        check.require(False, "cluster.sbatch", shown=flag, rule=rule)
    elif name == "time-min" and (least := seconds_of(value)) is not None and least <= cluster.signal_lead:
        lead = f"cluster.signal_lead = {cluster.signal_lead} s"
        rule = f"must be longer than {lead}: a job that Slurm makes that short is warned at once"
        check.require(False, "cluster.sbatch", shown=flag, rule=rule)


INSTEAD = "configs and job scripts are copied around, so export it in your shell or read it from a 0600 file"


def check_secrets(check: Checker) -> None:
    """Appends every text of the whole configuration that has the form of a secret, whatever its key; it is not shown."""
    for key, value in check.values.items():
        texts = value if isinstance(value, (list, tuple)) else (value,)
        for text in texts:
            if isinstance(text, str) and (what := form_of(text)) is not None:
                name = f"{text.partition('=')[0]}=..." if re.match(r"[A-Za-z_]\w*=", text) else "..."
                check.require(False, key, shown=name, rule=f"holds {what}; {INSTEAD}")

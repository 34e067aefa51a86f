"""Rules of a machine room: what goes into a job script must be well formed and never a secret."""

from __future__ import annotations

import re

from ecdit_train.config.rules import Checker
from ecdit_train.config.schema import RunConfig

_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<hours>\d{1,2}):(?P<minutes>[0-5]\d):(?P<seconds>[0-5]\d)")
_ENV = re.compile(r"(?P<name>[A-Za-z_][A-Za-z0-9_]*)=(?P<value>[^\n]*)")
_SECRET_WORDS = ("KEY", "TOKEN", "SECRET", "PASSWORD", "PASSWD", "PASSPHRASE", "CREDENTIAL")
_PLAIN = re.compile(r"[^\s\"'`$;&|<>\\]+")


def seconds(time_limit: str) -> int | None:
    """Seconds of a Slurm time HH:MM:SS or D-HH:MM:SS, or None if it is not one."""
    match = _TIME.fullmatch(time_limit)
    if match is None:
        return None
    days, hours, minutes, secs = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + secs


def is_secret_name(name: str) -> bool:
    """Whether a variable is named like a secret; TOKENIZERS_PARALLELISM is not."""
    parts = name.upper().split("_")
    return any(part.endswith((word, f"{word}S")) for part in parts for word in _SECRET_WORDS)


def check_cluster(cfg: RunConfig, check: Checker) -> None:
    """Appends what is wrong with `cfg.cluster`."""
    cluster = cfg.cluster
    check.at_least(1, [f"cluster.{name}" for name in ("nodes", "gpus_per_node", "cpus_per_gpu")])
    check.at_least(0, ["cluster.signal_lead"])
    figures = ["gpu_memory", "peak_flops", "gemm_efficiency", "memory_bandwidth", "intra_bandwidth", "inter_bandwidth"]
    check.positive([f"cluster.{name}" for name in figures])
    check.require(cluster.gemm_efficiency <= 1, "cluster.gemm_efficiency", rule="must not exceed 1", nearest=1.0)
    limit = seconds(cluster.time_limit)
    if check.require(
        limit is not None, "cluster.time_limit", rule="must be HH:MM:SS or D-HH:MM:SS", nearest="1-00:00:00"
    ):
        assert limit is not None
        rule = f"must be below cluster.time_limit = {cluster.time_limit} ({limit} s)"
        check.require(cluster.signal_lead < limit, "cluster.signal_lead", rule=rule, nearest=max(limit // 10, 0))
    for name in ("partition", "account", "qos", "container"):
        value = getattr(cluster, name)
        ok = value is None or _PLAIN.fullmatch(value) is not None
        check.require(ok, f"cluster.{name}", rule="must be one word without quotes or shell signs, or null")
    for module in cluster.modules:
        ok = _PLAIN.fullmatch(module) is not None
        check.require(ok, "cluster.modules", shown=module, rule="must be one word without quotes or shell signs")
    for entry in cluster.env:
        _check_env(entry, check)


def _check_env(entry: str, check: Checker) -> None:
    """One NAME=value line; a secret's value is never printed."""
    match = _ENV.fullmatch(entry)
    if match is None:
        check.require(False, "cluster.env", shown=entry.partition("=")[0], rule="must be NAME=value on one line")
        return
    name = match["name"]
    check.require(
        not is_secret_name(name) and not re.search(r"://[^/@\s]+:[^/@\s]+@", match["value"]),
        "cluster.env",
        shown=f"{name}=...",
        rule="looks like a secret; configs and job scripts are copied around, "
        "so export it in your shell or read it from a 0600 file",
    )

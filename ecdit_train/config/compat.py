"""Which differences between a stored run and a new configuration a resume may carry.

identity: changes the network, the data order or a random draw; another run. Never.
schedule: changes what happens from here on; only when the user says so on the command line.
free:     changes where and how it runs, not what is computed.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ecdit_train.config.convert import flatten, key_types
from ecdit_train.config.schema import RunConfig
from ecdit_train.errors import RunFolderError

Kind = Literal["identity", "schedule", "free"]

_CLASSES: dict[str, Kind] = {
    "run": "free",
    "experiment": "free",
    "config_dir": "free",
    "model": "identity",
    "moe": "identity",
    "moe.router.schedule": "schedule",
    "moe.form": "free",  # another way to the same result
    "moe.dispatcher._target_": "free",  # identity where one of the two changes the result, see `kind`
    "diffusion": "identity",
    "sample": "free",
    "encoders": "identity",
    "encoders.text.path": "free",
    "encoders.text.parameters": "free",
    "encoders.image.path": "free",
    "encoders.image.parameters": "free",
    "data.shards": "free",  # a copy elsewhere is the same data; the loader's state holds the manifest's fingerprint
    "data.sources": "free",  # so are these: what of them makes the order is in the loader's state
    "data.keep": "free",
    "data.take_down": "free",
    "data.manifest": "free",
    "data.buckets": "identity",
    "data.resolution": "identity",
    "data.threads": "free",
    "data.prefetch": "free",
    "data.on_bad": "free",
    "data.max_bad": "free",
    "data.captions": "schedule",
    "data.caption_weights": "schedule",
    "data.no_caption": "schedule",
    "data.decoder": "schedule",  # resized pictures differ by a few levels
    "data.stages": "schedule",
    "data.order": "identity",
    "data.shuffle": "schedule",
    "data.allow_pipe": "free",
    "data.in_flight": "free",
    "data.read_budget": "free",
    "data.read_retries": "free",
    "data.read_deadline": "free",
    "data.hedge_after": "free",
    "train.seed": "identity",
    "train.global_batch": "identity",
    "train.microbatch": "free",  # identity when a group is a microbatch, see `kind`
    "train.steps": "schedule",
    "train.precision": "schedule",  # identity where amax histories begin or end, see `kind`
    "train.fp8_recipe": "schedule",
    "train.fp8_backend": "free",  # the order of sums
    "train.init_from": "free",  # read only before the first checkpoint
    "optim": "schedule",
    "optim.optimizer._target_": "identity",
    "parallel": "free",
    "checkpoint": "free",
    "watch": "free",
    "health": "schedule",
    "health.digest_every": "free",
    "validation.images": "identity",
    "validation.every_steps": "free",
    "observe": "free",
    "cluster": "free",
}
"""Dotted key or section -> class; the longest match decides, so the keys of a slot's own class follow its section. A
new key without an entry fails a test."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """One key whose value differs."""

    field: str
    old: Any
    new: Any
    kind: Kind

    def __str__(self) -> str:
        return f"{self.field}: {self.old!r} -> {self.new!r} ({self.kind})"


def classes(cfg: RunConfig) -> dict[str, Kind]:
    """Every dotted key of a configuration with its class; raises KeyError for an unclassified one."""
    return {key: "identity" if _decides_state(key, cfg) else _lookup(key) for key in key_types(cfg)}


def _decides_state(key: str, cfg: RunConfig) -> bool:
    return key in {f"optim.optimizer.{name}" for name in cfg.optim.optimizer.identity}


def _lookup(key: str) -> Kind:
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        if (kind := _CLASSES.get(".".join(parts[:length]))) is not None:
            return kind
    raise KeyError(f"{key} has no class in ecdit_train/config/compat.py")


def kind(key: str, *, old: RunConfig, new: RunConfig) -> Kind:
    """The class of `key` between these two configurations."""
    if key == "train.microbatch" and any(_group_is_microbatch(c) for c in (old, new)):
        return "identity"
    dispatchers = [c.moe.dispatcher for c in (old, new) if c.moe.dispatcher is not None]
    if key == "moe.dispatcher._target_" and not all(d.same_result for d in dispatchers):
        return "identity"
    if _decides_state(key, old):
        return "identity"
    before, after = flatten(old).get(key), flatten(new).get(key)
    if key in ("optim.ema_decay", "optim.optimizer.momentum") and (before == 0) != (after == 0):
        return "identity"  # 0 means that the state has no such tensors
    if key in ("train.precision", "train.fp8_recipe") and len({c.train.recipe == "delayed" for c in (old, new)}) > 1:
        return "identity"  # one of them remembers largest magnitudes, the other has no such tensors
    if key == "moe.form" and new.train.recipe == "delayed":
        return (
            "identity"  # what is remembered behind experts is after their gates in one form, before them in the other
        )
    return _lookup(key)


def _group_is_microbatch(cfg: RunConfig) -> bool:
    router = cfg.moe.router
    return router is not None and (cfg.moe.scope == "batch" or router.whole_batch)


def diff(old: RunConfig, new: RunConfig) -> list[Change]:
    """Every key whose value differs, in the schema's order; None where only one of them has the key (another
    class fills a slot)."""
    before, after = flatten(old), flatten(new)
    return [
        Change(field=key, old=before.get(key), new=after.get(key), kind=kind(key, old=old, new=new))
        for key in dict.fromkeys([*before, *after])
        if before.get(key) != after.get(key) or (key in before) != (key in after)
    ]


def check_resume(old: RunConfig, new: RunConfig, allow: Collection[str] = ()) -> Sequence[Change]:
    """The changes that a resume carries.

    Args:
        old: the run folder's configuration.
        new: what the user asks for.
        allow: dotted keys given explicitly on the command line; only they may change the schedule.

    Raises:
        RunFolderError: lists every identity change and every schedule change that was not asked for.
    """
    changes = diff(old, new)
    refused = [f"{c}: another run; start a new run folder for it" for c in changes if c.kind == "identity"]
    refused += [
        f"{c}: give {c.field}={c.new} on the command line if you mean it"
        for c in changes
        if c.kind == "schedule" and c.field not in allow
    ]
    if refused:
        raise RunFolderError(f"{old.run} cannot be resumed with this configuration:\n" + "\n".join(refused))
    return changes

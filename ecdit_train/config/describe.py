"""What keys there are, what they mean and where two configurations differ. Meanings are the docstrings below the fields."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from ecdit_train.config.compat import classes, diff
from ecdit_train.config.convert import flatten, key_types, type_name
from ecdit_train.config.nearest import closest_key
from ecdit_train.config.resolve import field_docs
from ecdit_train.config.schema import RunConfig
from ecdit_train.config.slots import TARGET
from ecdit_train.errors import ConfigError, Problem


def meanings(cfg: RunConfig) -> dict[str, str]:
    """Dotted key -> what it means, on one line; of a slot's `_target_`, what the class is."""
    found: dict[str, str] = {}
    docs: Any = cache(field_docs)  # of a class: its source is read once
    for key in key_types(cfg):
        *parents, leaf = key.split(".")
        owner: Any = cfg
        for part in parents:
            owner = owner.get(part) if isinstance(owner, Mapping) else getattr(owner, part)
        if leaf == TARGET:
            found[key] = " ".join((type(owner).__doc__ or "").split("\n\n")[0].split())
        else:
            found[key] = docs(type(owner)).get(leaf, "")
    return found


def explain(key: str, cfg: RunConfig, *, groups: Mapping[str, tuple[str, ...]]) -> str:
    """A key's type, value, what a resume thinks of changing it, and its meaning; or a group's choices and keys.

    Args:
        key: a dotted key, or a group.
        cfg: which classes fill the slots decides which keys there are.
        groups: group -> its choices.

    Raises:
        ConfigError: no such key or group, with the nearest one.
    """
    types = key_types(cfg)
    if key in types:
        value = _text(flatten(cfg)[key])
        return f"{key} = {value}: {type_name(types[key])} [{classes(cfg)[key]}]\n{meanings(cfg)[key]}"
    inside = [k for k in types if k.startswith(f"{key.replace('/', '.')}.")]
    if key in groups:
        return "\n".join([f"{key}: one of {', '.join(groups[key])}", *inside])
    if inside:
        return "\n".join([f"{key}: a section", *inside])
    nearest = closest_key(key, [*types, *groups])
    raise ConfigError(Problem(field=key, value=None, rule="unknown key", nearest=nearest))


def differences(cfg: RunConfig, base: RunConfig) -> list[str]:
    """One line `key: value` for every key of `cfg` that differs from `base`, in the schema's order."""
    return [f"{change.field}: {_text(change.new)}" for change in diff(base, cfg)]


def _text(value: object) -> str:
    """A value as YAML would say it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return "[" + ", ".join(str(v) for v in value) + "]" if isinstance(value, tuple) else str(value)

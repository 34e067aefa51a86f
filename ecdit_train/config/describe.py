"""What keys there are, what they mean and where two configurations differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from ecdit_train.config.compat import classes, diff
from ecdit_train.config.compose import groups
from ecdit_train.config.convert import key_types, type_name
from ecdit_train.config.nearest import closest_key
from ecdit_train.config.schema import RunConfig
from ecdit_train.config.slots import SlotConfig, field_docs
from ecdit_train.errors import ConfigError, Problem


def comments(cfg: RunConfig) -> dict[str, str]:
    """Dotted key -> the docstring below its field, for every key of a configuration; a slot's `_target_` is described by its class."""
    return dict(_comments(cfg, prefix=""))


def _comments(section: Any, *, prefix: str) -> Iterator[tuple[str, str]]:
    docs = field_docs(type(section))
    for field in dataclasses.fields(section):
        value, key = getattr(section, field.name), f"{prefix}{field.name}"
        inside = value.items() if isinstance(value, Mapping) else [("", value)]
        for name, item in inside:
            if dataclasses.is_dataclass(item) and not isinstance(item, type):
                below = f"{key}.{name}." if name else f"{key}."
                if isinstance(item, SlotConfig):
                    yield f"{below}_target_", " ".join((type(item).__doc__ or "").split())
                yield from _comments(item, prefix=below)
            else:
                yield key, docs.get(field.name, "")


def explain(key: str, cfg: RunConfig) -> str:
    """A key's meaning, type, and what a resume thinks of changing it; or a group's choices.

    Raises:
        ConfigError: no such key or group, with the nearest one.
    """
    types = key_types(cfg)
    if key in types:
        return f"{key}: {type_name(types[key])} [{classes(cfg)[key]}]\n{comments(cfg)[key]}"
    if key in groups():
        lines = [f"{key}: one of {', '.join(groups()[key])}"]
        lines += [k for k in types if k.startswith(f"{key.replace('/', '.')}.")]
        return "\n".join(lines)
    nearest = closest_key(key, [*types, *groups()])
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

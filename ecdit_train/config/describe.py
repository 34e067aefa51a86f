"""What keys there are, what they mean and where two configurations differ."""

from __future__ import annotations

import re
from functools import cache

from ecdit_train.config.compat import classes, diff
from ecdit_train.config.compose import conf_folder, groups
from ecdit_train.config.convert import leaf_types, section_names, type_name
from ecdit_train.config.nearest import closest_key
from ecdit_train.config.schema import RunConfig
from ecdit_train.errors import ConfigError, Problem


def keys() -> tuple[str, ...]:
    """All dotted keys, in the schema's order."""
    return tuple(leaf_types())


@cache
def comments() -> dict[str, str]:
    """Dotted key -> the comment above it in `conf/`, from the first file of its group that has one."""
    found = _comments_of((conf_folder() / "config.yaml").read_text(encoding="utf-8"), prefix="")
    for group, choices in groups().items():
        if group in section_names():
            for choice in choices:
                text = (conf_folder() / group / f"{choice}.yaml").read_text(encoding="utf-8")
                for key, comment in _comments_of(text, prefix=f"{group}.").items():
                    found.setdefault(key, comment)
    return {key: found[key] for key in keys() if key in found}


def _comments_of(text: str, *, prefix: str) -> dict[str, str]:
    """Comments directly above each key, or at the end of its line; sections by indentation."""
    found: dict[str, str] = {}
    pending: list[str] = []
    path: list[tuple[int, str]] = []
    for line in text.splitlines():
        stripped = line.strip()
        if stripped.startswith("#"):
            pending.append(stripped.lstrip("# "))
        elif match := re.match(r"( *)([A-Za-z_]\w*):(.*)", line):
            indent, name, rest = len(match[1]), match[2], match[3]
            path = [*((i, n) for i, n in path if i < indent), (indent, name)]
            trailing = rest.partition(" # ")[2].strip()
            comment = " ".join(pending) or trailing
            if comment:
                found[prefix + ".".join(n for _, n in path)] = comment
            pending = []
        else:
            pending = []
    return found


def explain(key: str) -> str:
    """A key's meaning, type, and what a resume thinks of changing it; or a group's choices.

    Raises:
        ConfigError: no such key or group, with the nearest one.
    """
    if key in leaf_types():
        note = comments().get(key, "")
        return f"{key}: {type_name(leaf_types()[key])} [{classes()[key]}]\n{note}"
    if key in groups():
        lines = [f"{key}: one of {', '.join(groups()[key])}"]
        lines += [k for k in keys() if k.startswith(f"{key}.")]
        return "\n".join(lines)
    nearest = closest_key(key, [*keys(), *groups()])
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

"""YAML trees to frozen dataclasses and back, strictly, by type hints; collects every problem before it raises.

Nothing is guessed: an int field takes no float, a string field takes no list, and a missing key has no default.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ecdit_train.config.nearest import closest
from ecdit_train.config.schema import RunConfig
from ecdit_train.errors import ConfigError, Problem

MISSING = "???"
"""OmegaConf's mark of a value that must be given."""

T = TypeVar("T")


@cache
def hints(cls: type) -> Mapping[str, Any]:
    """Resolved type hints of a dataclass's fields, in order."""
    resolved = get_type_hints(cls)
    return {field.name: resolved[field.name] for field in dataclasses.fields(cls)}


@cache
def leaf_types(cls: type = RunConfig) -> Mapping[str, Any]:
    """Every dotted key of the schema with its type, in the schema's order."""
    found: dict[str, Any] = {}
    for name, hint in hints(cls).items():
        if dataclasses.is_dataclass(hint):
            found.update({f"{name}.{key}": value for key, value in leaf_types(hint).items()})  # type: ignore[arg-type]
        else:
            found[name] = hint
    return found


@cache
def section_names(cls: type = RunConfig) -> tuple[str, ...]:
    """Dotted names of all sections: model, encoders, encoders.text, ..."""
    keys = leaf_types(cls)
    return tuple(dict.fromkeys(key[:i] for key in keys for i, char in enumerate(key) if char == "."))


def type_name(hint: Any) -> str:
    """A type as a user would say it."""
    if hint is type(None):
        return "null"
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(str(a) for a in args)
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(a) for a in args)
    if origin is tuple:
        return f"a list of {type_name(args[0])}"
    return {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}.get(
        getattr(hint, "__name__", ""), str(hint)
    )


def convert(hint: Any, value: Any, *, field: str, problems: list[Problem]) -> Any:
    """`value` as type `hint`; appends to `problems` and returns None where it does not fit."""
    origin, args = get_origin(hint), get_args(hint)
    if isinstance(value, str) and value == MISSING:
        problems.append(Problem(field=field, value=MISSING, rule=f"must be given: {type_name(hint)}"))
        return None
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (hint,) = (a for a in args if a is not type(None))  # the schema has only `X | None`
        return convert(hint, value, field=field, problems=problems)
    if origin is Literal:
        if isinstance(value, str) and value in args:
            return value
        nearest = closest(str(value), args)
        problems.append(Problem(field=field, value=value, rule=f"must be {type_name(hint)}", nearest=nearest))
        return None
    if origin is tuple:
        if not isinstance(value, list | tuple):
            problems.append(Problem(field=field, value=value, rule=f"must be {type_name(hint)}", nearest=f"[{value}]"))
            return None
        return tuple(convert(args[0], v, field=f"{field}[{i}]", problems=problems) for i, v in enumerate(value))
    return _scalar(hint, value, field=field, problems=problems)


def _scalar(hint: Any, value: Any, *, field: str, problems: list[Problem]) -> Any:
    nearest: object | None = None
    is_bool = isinstance(value, bool)
    if hint is bool and is_bool:
        return value
    if hint is int and isinstance(value, int) and not is_bool:
        return value
    if hint is float and isinstance(value, int | float) and not is_bool and math.isfinite(value):
        return float(value)
    if hint is str and isinstance(value, str):
        return value
    if hint is str and isinstance(value, int) and not is_bool:
        return str(value)  # `cluster.account=1234` is read as a number by the command line's grammar
    if hint is int and isinstance(value, float) and math.isfinite(value):
        nearest = round(value)
    if hint is bool and isinstance(value, int | str):
        nearest = {"1": "true", "yes": "true", "on": "true", "0": "false", "no": "false", "off": "false"}.get(
            str(value).lower()
        )
    problems.append(Problem(field=field, value=value, rule=f"must be {type_name(hint)}", nearest=nearest))
    return None


def _build(cls: type, tree: Any, *, prefix: str, problems: list[Problem]) -> Any:
    """A dataclass from a mapping, or None after appending what is wrong."""
    if not isinstance(tree, Mapping):
        where = prefix.rstrip(".") or "config"
        problems.append(Problem(field=where, value=tree, rule="must be a section with keys: " + ", ".join(hints(cls))))
        return None
    before = len(problems)
    known = hints(cls)
    for key in tree:
        if key not in known:
            nearest = closest(str(key), tuple(known))
            problems.append(
                Problem(
                    field=f"{prefix}{key}",
                    value=tree[key],
                    rule="unknown key",
                    nearest=f"{prefix}{nearest}" if nearest else None,
                )
            )
    values: dict[str, Any] = {}
    for name, hint in known.items():
        if name not in tree:
            problems.append(Problem(field=f"{prefix}{name}", value=None, rule="missing key"))
        elif dataclasses.is_dataclass(hint):
            values[name] = _build(hint, tree[name], prefix=f"{prefix}{name}.", problems=problems)  # type: ignore[arg-type]
        else:
            values[name] = convert(hint, tree[name], field=f"{prefix}{name}", problems=problems)
    return cls(**values) if len(problems) == before else None


def from_dict(tree: Mapping[str, Any], *, cls: type[T] = RunConfig) -> T:  # type: ignore[assignment]
    """A frozen dataclass from a YAML tree. Raises one ConfigError with every unknown, missing or ill-typed key."""
    problems: list[Problem] = []
    built = _build(cls, tree, prefix="", problems=problems)
    if problems:
        raise ConfigError(problems)
    return built


def to_dict(cfg: Any) -> dict[str, Any]:
    """The YAML tree of a dataclass: sections to dicts, tuples to lists."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return [plain(v) for v in value] if isinstance(value, tuple) else value

    return plain(cfg)


def flatten(cfg: RunConfig) -> dict[str, Any]:
    """Dotted key -> value, in the schema's order."""
    flat: dict[str, Any] = {}
    for key in leaf_types():
        value: Any = cfg
        for part in key.split("."):
            value = getattr(value, part)
        flat[key] = value
    return flat


def with_values(cfg: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """`cfg` with some dotted keys replaced; strict about keys and types."""
    tree = to_dict(cfg)
    for key, value in values.items():
        *sections, leaf = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[leaf] = list(value) if isinstance(value, tuple) else value
    return from_dict(tree)

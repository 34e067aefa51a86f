"""YAML trees to frozen dataclasses and back, strictly, by type hints; collects every problem before it raises.

pydantic reads the leaves. The walk over the tree is ours, because a slot's class is named inside the tree (`_target_`) and
every unknown key is answered with the nearest one. Nothing is guessed: an int field takes no float, a string field takes no
list, and a missing key has no default unless its class gives one.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from ecdit_train.config.nearest import closest
from ecdit_train.config.resolve import resolve
from ecdit_train.config.schema import RunConfig
from ecdit_train.config.slots import TARGET, SlotConfig
from ecdit_train.errors import ConfigError, Problem

MISSING = "???"
"""OmegaConf's mark of a value that must be given."""

T = TypeVar("T")


@cache
def hints(cls: type) -> Mapping[str, Any]:
    """Resolved type hints of a dataclass's fields, in order."""
    resolved = get_type_hints(cls)
    return {field.name: resolved[field.name] for field in dataclasses.fields(cls)}


def _without_none(hint: Any) -> Any:
    """X of `X | None`; any other hint as it is."""
    if get_origin(hint) in (Union, types.UnionType) and type(None) in get_args(hint):
        rest = [a for a in get_args(hint) if a is not type(None)]
        return rest[0] if len(rest) == 1 else Union[tuple(rest)]  # noqa: UP007 - made from a list
    return hint


def _slot_base(hint: Any) -> type[SlotConfig] | None:
    hint = _without_none(hint)
    return hint if isinstance(hint, type) and issubclass(hint, SlotConfig) else None


def _named(hint: Any) -> type | None:
    """The class of `Mapping[str, SomeSlotConfig]`, or of one of other sections."""
    inner = get_args(hint)[1] if get_origin(hint) in (dict, Mapping) else None
    return inner if isinstance(inner, type) and dataclasses.is_dataclass(inner) else _slot_base(inner)


# --- reading -----------------------------------------------------------------------------------------------------------


def from_dict(tree: Mapping[str, Any], *, cls: type[T] = RunConfig) -> T:  # type: ignore[assignment]
    """A frozen dataclass from a YAML tree. Raises one ConfigError with every unknown, missing or ill-typed key."""
    problems: list[Problem] = []
    built = _section(cls, tree, prefix="", problems=problems)
    if problems:
        raise ConfigError(problems)
    return built


def convert(hint: Any, value: Any, *, field: str, problems: list[Problem]) -> Any:
    """`value` as type `hint`; appends to `problems` and returns None where it does not fit."""
    if isinstance(value, str) and value == MISSING:
        problems.append(Problem(field=field, value=MISSING, rule=f"must be given: {type_name(hint)}"))
        return None
    if (named := _named(hint)) is not None:
        if not isinstance(value, Mapping):
            problems.append(Problem(field=field, value=value, rule="must be a section: a name and an object for each"))
            return None
        if _slot_base(named) is None:
            return {k: _section(named, v, prefix=f"{field}.{k}.", problems=problems) for k, v in value.items()}
        return {k: _slot(named, v, field=f"{field}.{k}", problems=problems) for k, v in value.items()}
    if (base := _slot_base(hint)) is not None:
        optional = hint is not base
        return None if value is None and optional else _slot(base, value, field=field, problems=problems)
    inner = _without_none(hint)
    if dataclasses.is_dataclass(inner):
        return (
            None
            if value is None and inner is not hint
            else _section(inner, value, prefix=f"{field}.", problems=problems)
        )
    return _leaf(hint, value, field=field, problems=problems)


def _slot(base: type[SlotConfig], tree: Any, *, field: str, problems: list[Problem]) -> Any:
    if not isinstance(tree, Mapping) or TARGET not in tree:
        rule = f"must be an object with {TARGET}; choose one with {field.replace('.', '/')}=NAME (see `ecdit slots`)"
        problems.append(Problem(field=field, value=tree, rule=rule))
        return None
    try:
        cls = resolve(tree[TARGET], base, field=field)
    except ConfigError as error:
        problems += error.problems
        return None
    rest = {key: value for key, value in tree.items() if key != TARGET}
    return _section(cls, rest, prefix=f"{field}.", problems=problems)


def _section(cls: Any, tree: Any, *, prefix: str, problems: list[Problem]) -> Any:
    """A dataclass from a mapping, or None after appending what is wrong."""
    known = hints(cls)
    if not isinstance(tree, Mapping):
        where = prefix.rstrip(".") or "config"
        problems.append(Problem(field=where, value=tree, rule="must be a section with keys: " + ", ".join(known)))
        return None
    before = len(problems)
    for key in tree:
        if key not in known:
            near = closest(str(key), tuple(known))
            nearest = f"{prefix}{near}" if near else None
            problems.append(Problem(field=f"{prefix}{key}", value=tree[key], rule="unknown key", nearest=nearest))
    values: dict[str, Any] = {}
    unset = dataclasses.MISSING
    defaults = {f.name for f in dataclasses.fields(cls) if f.default is not unset or f.default_factory is not unset}
    for name, hint in known.items():
        if name in tree:
            values[name] = convert(hint, tree[name], field=f"{prefix}{name}", problems=problems)
        elif name not in defaults:
            rule = f"missing key: {type_name(hint)}"
            problems.append(Problem(field=f"{prefix}{name}", value=None, rule=rule))
    return cls(**values) if len(problems) == before else None


@cache
def _adapter(hint: Any) -> TypeAdapter:
    return TypeAdapter(hint, config=ConfigDict(strict=True, allow_inf_nan=False))


def _leaf(hint: Any, value: Any, *, field: str, problems: list[Problem]) -> Any:
    if isinstance(value, tuple):
        value = list(value)
    if type(value) is int and str in (hint, _without_none(hint)):
        value = str(value)  # `cluster.account=1234` is read as a number by the command line's grammar
    if isinstance(value, list) and get_args(_without_none(hint))[:1] == (str,):
        value = [str(item) if type(item) is int else item for item in value]
    try:
        # As JSON: pydantic's strict mode then takes a list for a tuple and nothing else for anything else.
        return _adapter(hint).validate_json(json.dumps(value))
    except (ValidationError, TypeError) as error:
        where = error.errors()[0]["loc"] if isinstance(error, ValidationError) else ()
        index = next((part for part in where if isinstance(part, int)), None)
        if isinstance(value, list) and index is not None:
            inner = get_args(_without_none(hint))[0]
            problem = _misfit(inner, value[index], field=f"{field}[{index}]")
        else:
            problem = _misfit(hint, value, field=field)
        problems.append(problem)
        return None


def _misfit(hint: Any, value: Any, *, field: str) -> Problem:
    nearest: object | None = None
    inner = _without_none(hint)
    if get_origin(inner) is Literal:
        nearest = closest(str(value), get_args(inner))
    elif get_args(inner)[1:] == (...,) and not isinstance(value, list | Mapping):
        nearest = f"[{value}]"
    elif inner is int and isinstance(value, float) and math.isfinite(value):
        nearest = round(value)
    elif inner is bool and isinstance(value, int | str):
        nearest = {"1": "true", "yes": "true", "on": "true", "0": "false", "no": "false", "off": "false"}.get(
            str(value).lower()
        )
    return Problem(field=field, value=value, rule=f"must be {type_name(hint)}", nearest=nearest)


def type_name(hint: Any) -> str:
    """A type as a user would say it."""
    if hint is type(None):
        return "null"
    if (base := _slot_base(hint)) is not None:
        return f"an object of a {base.__name__}" + ("" if base is hint else " or null")
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(str(a) for a in args)
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(a) for a in args)
    if origin is tuple:
        each = f"a list of {type_name(args[0])}"
        return each if args[1:] == (...,) else f"[{', '.join(map(type_name, args))}]"
    return {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}.get(
        getattr(hint, "__name__", ""), str(hint)
    )


# --- writing, and looking into a tree ----------------------------------------------------------------------------------


def to_dict(cfg: Any) -> dict[str, Any]:
    """The YAML tree of a dataclass: sections to dicts, slots with their `_target_` first, tuples to lists."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            head = {TARGET: value.target()} if isinstance(value, SlotConfig) else {}
            return head | {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, Mapping):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, tuple) else value

    return plain(cfg)


def flatten(cfg: Any) -> dict[str, Any]:
    """Dotted key -> value of every leaf, in the schema's order; a slot's class is its key `_target_`, an empty slot its own key."""
    return {key: value for key, _, value in _leaves(type(cfg), cfg, prefix="")}


def key_types(cfg: Any) -> dict[str, Any]:
    """Dotted key -> type of every leaf of a configuration, or of a composed tree (which may be wrong in places: a slot whose class
    cannot be found has `_target_` only). In the schema's order."""
    cls = RunConfig if isinstance(cfg, Mapping) else type(cfg)
    return {key: hint for key, hint, _ in _leaves(cls, cfg, prefix="")}


def section_names(cfg: Any) -> tuple[str, ...]:
    """Dotted names of all sections of a configuration or tree: model, encoders, encoders.text, ..."""
    return tuple(dict.fromkeys(key[:i] for key in key_types(cfg) for i, char in enumerate(key) if char == "."))


def _leaves(cls: Any, node: Any, *, prefix: str) -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, hint, value) of each leaf below `node`: a dataclass of type `cls`, or the mapping of one."""
    for name, hint in hints(cls).items():
        value = node.get(name) if isinstance(node, Mapping) else getattr(node, name)
        yield from _leaves_of(hint, value, key=f"{prefix}{name}")


def _leaves_of(hint: Any, value: Any, *, key: str) -> Iterator[tuple[str, Any, Any]]:
    inner = _without_none(hint)
    if (named := _named(hint)) is not None:
        for name, part in (value or {}).items() if isinstance(value, Mapping) else ():
            yield from _leaves_of(named, part, key=f"{key}.{name}")
    elif (base := _slot_base(hint)) is not None:
        if value is None:
            yield key, hint, None
            return
        cls: Any = type(value)
        if isinstance(value, Mapping):
            try:
                cls = resolve(value.get(TARGET), base, field=key)
            except ConfigError:
                cls = None
        yield f"{key}.{TARGET}", str, value.get(TARGET) if isinstance(value, Mapping) else value.target()
        if cls is not None and dataclasses.is_dataclass(cls):
            yield from _leaves(cls, value, prefix=f"{key}.")
    elif dataclasses.is_dataclass(inner):
        yield from _leaves(inner, {} if value is None else value, prefix=f"{key}.")
    else:
        yield key, hint, value


def with_values(cfg: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """`cfg` with some dotted keys replaced (a section or slot by a mapping); strict about keys and types."""
    tree = to_dict(cfg)
    for key, value in values.items():
        *sections, leaf = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[leaf] = list(value) if isinstance(value, tuple) else value
    return from_dict(tree)

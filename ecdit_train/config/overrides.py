"""Reads the command line's `key=value` and `group=choice` words and refuses every wrong one at once.

Hydra stops at the first bad word and suggests nothing for keys; here all words are looked at before Hydra sees any.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import HydraException

from ecdit_train.config.convert import convert, leaf_types, section_names
from ecdit_train.config.nearest import closest, closest_key
from ecdit_train.errors import ConfigError, Problem

OPTIONAL_GROUPS = frozenset({"experiment", "local"})
"""Groups that may be switched off with `group=null`."""


@dataclass(frozen=True, kw_only=True)
class Overrides:
    """The command line, read: `groups` are choices (None: off), `values` are dotted keys."""

    groups: Mapping[str, str | None]
    values: Mapping[str, Any]
    words: tuple[str, ...]
    """What Hydra gets: later words replace earlier ones about the same group."""


def read(words: Sequence[str], *, groups: Mapping[str, Sequence[str]]) -> Overrides:
    """Reads all words; raises one ConfigError that lists every wrong one with its nearest valid name.

    Args:
        words: for example `["experiment=ec_dit_xl_8e", "train.steps=10"]`.
        groups: Hydra group -> its choices.
    """
    problems: list[Problem] = []
    chosen: dict[str, str | None] = {}
    values: dict[str, Any] = {}
    kept: dict[str, str] = {}
    for word in words:
        parsed = _parse(word, problems=problems)
        if parsed is None:
            continue
        key = parsed.key_or_group
        if parsed.is_sweep_override():
            text = word.partition("=")[2]
            problems.append(
                Problem(
                    field=key, value=text, rule="takes one value; a list is written [a,b]", nearest=f"{key}=[{text}]"
                )
            )
        elif key in groups:
            choice = _choice(key, parsed, groups[key], problems=problems)
            chosen[key] = choice
            kept[key] = word if choice is not None else f"~{key}"  # Hydra's way to say null
        elif key in leaf_types():
            values[key] = _value(key, parsed, problems=problems)
            kept[key] = word
        elif key in section_names():
            inside = [k for k in leaf_types() if k.startswith(f"{key}.")]
            problems.append(
                Problem(field=key, value=_plain(parsed), rule="is a section; set one of " + ", ".join(inside))
            )
        else:
            problems.append(
                Problem(
                    field=key,
                    value=_plain(parsed),
                    rule="unknown key",
                    nearest=closest_key(key, [*leaf_types(), *groups]),
                )
            )
    if problems:
        raise ConfigError(problems)
    return Overrides(groups=chosen, values=values, words=tuple(kept.values()))


def _parse(word: str, *, problems: list[Problem]) -> Override | None:
    """One word through Hydra's own grammar; None after appending why not."""
    if word.startswith(("+", "~")):
        rule = "`+` and `~` are not used: every key exists already, write key=value"
        bare = word.lstrip("+~")
        problems.append(Problem(field=bare.partition("=")[0], value=word, rule=rule, nearest=bare))
        return None
    if "=" not in word:
        rule = "is not key=value"
        problems.append(Problem(field=word, value=None, rule=rule, nearest=f"{word}=VALUE"))
        return None
    key, _, text = word.partition("=")
    try:
        parsed = OverridesParser.create().parse_override(word)
    except HydraException:
        rule = "cannot be read; put quotes around special characters"
        problems.append(Problem(field=key, value=text, rule=rule, nearest=f"{key}={_quoted(text)}"))
        return None
    if parsed.package is not None:
        problems.append(
            Problem(field=key.strip(), value=text, rule="packages (@) are not used", nearest=parsed.key_or_group)
        )
        return None
    return parsed


def _quoted(text: str) -> str:
    """`text` with the quotes that were probably missing: around each item of a list, else around the whole."""
    if text.startswith("[") and text.endswith("]"):
        return "[" + ",".join(f"'{item.strip()}'" for item in text[1:-1].split(",")) + "]"
    return f"'{text}'"


def _choice(group: str, parsed: Override, choices: Sequence[str], *, problems: list[Problem]) -> str | None:
    value = _plain(parsed)
    if value is None and group in OPTIONAL_GROUPS:
        return None
    if isinstance(value, str | int | float) and str(value) in choices:
        return str(value)
    rule = f"unknown choice of {group}; there are " + ", ".join(choices)
    problems.append(Problem(field=group, value=value, rule=rule, nearest=closest(str(value), choices)))
    return None


def _value(key: str, parsed: Override, *, problems: list[Problem]) -> Any:
    value = _plain(parsed)
    if isinstance(value, str) and "${" in value:
        return value  # an interpolation: typed after Hydra has resolved it
    return convert(leaf_types()[key], value, field=key, problems=problems)


def _plain(parsed: Override) -> Any:
    """The value as plain Python: quotes taken off, also inside lists."""

    def strip(value: Any) -> Any:
        if isinstance(value, QuotedString):
            return value.text
        return [strip(v) for v in value] if isinstance(value, list) else value

    return strip(parsed._value)

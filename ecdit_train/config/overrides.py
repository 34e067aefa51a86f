"""Reads words of the command line by Hydra's grammar and finds every wrong one, each with a correction that is valid.

Hydra stops at the first bad word and suggests nothing for keys. Here a wrong word is noted, its correction takes its
place, and the reading goes on: so no problem hides another. Groups come first (`groups.py` beside this file), since which
keys there are depends on them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_origin

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType, Quote, QuotedString
from hydra.errors import HydraException

from ecdit_train.config.convert import convert, hints, named_sections
from ecdit_train.config.nearest import closest_key
from ecdit_train.errors import Problem


@dataclass(frozen=True, kw_only=True)
class Word:
    """One word as typed. `parsed` is None where Hydra's grammar cannot read it; `key` has no `+`, `++` or `~`."""

    index: int
    text: str
    key: str
    parsed: Override | None

    @property
    def sign(self) -> str:
        return self.text[: len(self.text) - len(self.text.lstrip("+~"))]

    @property
    def adds(self) -> bool:
        """Whether it begins with one `+`."""
        return self.parsed is not None and self.parsed.type is OverrideType.ADD

    @property
    def forces(self) -> bool:
        """Whether it begins with `++`."""
        return self.parsed is not None and self.parsed.type is OverrideType.FORCE_ADD

    @property
    def value_text(self) -> str:
        return self.text.partition("=")[2]


@dataclass
class Ledger:
    """What is wrong with a list of words, and the list as it would be with every correction made."""

    words: list[str | None]
    found: list[tuple[int, Problem]] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    """Keys of words that have no correction; what follows from their absence is not the user's mistake."""

    def wrong(self, word: Word, *, rule: str, value: object, nearest: object = None, better: str | None = None) -> None:
        """Notes a problem. `nearest` is what the user is told, `better` the whole word that it means."""
        self.found.append((word.index, Problem(field=word.key, value=value, rule=rule, nearest=nearest)))
        self.words[word.index] = better
        if better is None:
            self.dropped.append(word.key)

    def problems(self) -> list[Problem]:
        return [problem for _, problem in sorted(self.found, key=lambda pair: pair[0])]

    def corrected(self) -> list[str]:
        return [word for word in self.words if word is not None]

    def hides(self, problem: Problem) -> bool:
        """Whether a later problem may only be there because a word was dropped."""
        return any(
            f"{problem.field}.".startswith(f"{key}.") or re.search(rf"(?<![\w.]){re.escape(key)} = ", problem.rule)
            for key in (key.replace("/", ".") for key in self.dropped)
        )


def split(words: Sequence[str]) -> list[Word]:
    """Every word through Hydra's grammar."""
    parser = OverridesParser.create()
    found = []
    for index, text in enumerate(words):
        parsed = parse(text, parser=parser)
        key = parsed.key_or_group if parsed else text.partition("=")[0].lstrip("+~").strip()
        found.append(Word(index=index, text=text, key=key, parsed=parsed))
    return found


def parse(text: str, *, parser: OverridesParser | None = None) -> Override | None:
    try:
        return (parser or OverridesParser.create()).parse_override(text)
    except HydraException:
        return None


def plain(parsed: Override) -> Any:
    """The value as plain Python: quotes taken off, also inside lists and mappings."""
    return Override._convert_value(parsed._value)  # type: ignore[arg-type]


def quoted(text: str) -> str:
    """`text` between quotes, as the grammar reads it back."""
    quote = Quote.double if "'" in text and '"' not in text else Quote.single
    return QuotedString(text=text, quote=quote).with_quotes()


# --- values ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What value words may name, once the groups are chosen."""

    types: Mapping[str, Any]
    """Dotted key -> type."""
    tree: Mapping[str, Any]
    """The composed tree without the value words."""
    groups: Mapping[str, Sequence[str]]
    sections: Sequence[str] = ()
    """The only sections that words may change; none: all."""
    elsewhere: Any = None
    """Dotted key -> a note which choice of its group has it, or None."""
    own: Sequence[str] = ()
    """Keys of the verb's own, for corrections."""

    def keys(self) -> list[str]:
        """What a misspelt key may have meant."""
        inside = [k for k in self.types if not self.sections or k.startswith(tuple(f"{s}." for s in self.sections))]
        groups = [g for g in self.groups if not self.sections or g.split("/")[0] in self.sections]
        return [*self.own, *inside, *groups]


def read_values(words: Sequence[Word], vocabulary: Vocabulary, ledger: Ledger) -> list[Override]:
    """The words that set keys, as Hydra is to apply them; wrong ones go into the ledger."""
    good = []
    vocabulary = replace(vocabulary, types={**vocabulary.types, **_named_by(words)})
    for word in words:
        before = len(ledger.found)
        _read_value(word, vocabulary, ledger)
        if len(ledger.found) == before and word.parsed is not None:
            # `++` because the key is known to be right, also where a slot's YAML leaves it to its default.
            text = word.text if word.parsed.is_delete() else f"++{word.key}={word.value_text}"
            good.append(parse(text))
    return [override for override in good if override is not None]


def _read_value(word: Word, vocabulary: Vocabulary, ledger: Ledger) -> None:
    types, parsed = vocabulary.types, word.parsed
    if parsed is None:
        _unreadable(word, vocabulary, ledger)
        return
    shown = word.value_text if parsed.is_sweep_override() else plain(parsed)
    if vocabulary.sections and word.key.split(".")[0] not in vocabulary.sections and _known(word.key, vocabulary):
        rule = "belongs to the run as it was trained; this verb changes only " + ", ".join(vocabulary.sections)
        ledger.wrong(word, rule=rule, value=shown)
    elif not _known(word.key, vocabulary):
        _unknown(word, vocabulary, ledger, shown=shown)
    elif parsed.is_sweep_override():
        rule = "takes one value; -m runs one job for each of several"
        first = next(iter(_sweep_values(parsed)), None)
        is_list = get_origin(types.get(word.key)) is tuple
        candidates = [f"[{word.value_text}]"] if is_list else []
        better = _accepted(word.key, [*candidates, *([first] if first is not None else [])], vocabulary)
        ledger.wrong(word, rule=rule, value=shown, nearest=better, better=better)
    elif word.adds and _lookup(vocabulary.tree, word.key) is not None and not _mergeable(parsed):
        better = f"{word.key}={word.value_text}"
        ledger.wrong(word, rule="is there already; `+` adds a key", value=shown, nearest=better, better=better)
    elif parsed.is_delete():
        there = _lookup(vocabulary.tree, word.key)
        if shown is not None and shown != there:
            rule = f"cannot be taken away: its value is {there!r}"
            ledger.wrong(word, rule=rule, value=shown, nearest=f"~{word.key}", better=f"~{word.key}")
    else:
        for key, value in _leaves(word.key, shown, types):
            _check_type(word, key, value, vocabulary, ledger)


def _named_by(words: Sequence[Word]) -> dict[str, Any]:
    """Dotted key -> type of every key in sections to which words give a name:
    `data.sources={photos: {...}}` or `data.sources.photos.weight=1`."""
    found: dict[str, Any] = {}
    for key, cls in named_sections().items():
        names: dict[str, None] = {}
        for word in words:
            if word.key == key and word.parsed is not None and not word.parsed.is_sweep_override():
                value = plain(word.parsed)
                names |= dict.fromkeys(value if isinstance(value, Mapping) else ())
            elif word.key.startswith(f"{key}."):
                names[word.key.removeprefix(f"{key}.").split(".")[0]] = None
        found |= {f"{key}.{name}.{field}": hint for name in names for field, hint in hints(cls).items()}
    return found


def _known(key: str, vocabulary: Vocabulary) -> bool:
    return key in vocabulary.types or _is_section(key, vocabulary.types)


def _is_section(key: str, types: Mapping[str, Any]) -> bool:
    return any(k.startswith(f"{key}.") for k in types)


def _leaves(key: str, value: Any, types: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything that a word sets: `section={a: 1, b: 2}` sets two."""
    if isinstance(value, Mapping) and key not in types:
        for name, inner in value.items():
            yield from _leaves(f"{key}.{name}", inner, types)
    else:
        yield key, value


def _check_type(word: Word, key: str, value: Any, vocabulary: Vocabulary, ledger: Ledger) -> None:
    if key not in vocabulary.types:
        inside = [k for k in vocabulary.types if k.startswith(f"{key}.")]
        if inside:
            ledger.wrong(word, rule="is a section; set one of " + ", ".join(inside), value=value)
        else:  # inside `section={...}`
            rule, near = f"has no key {key}", closest_key(key, list(vocabulary.types))
            ledger.wrong(word, rule=rule, value=value, nearest=near)
            ledger.dropped.append(key)
        return
    if isinstance(value, str) and "${" in value:
        return  # an interpolation: typed after Hydra has resolved it
    problems: list[Problem] = []
    convert(vocabulary.types[key], value, field=key, problems=problems)
    for problem in problems:
        better = None
        if key == word.key:
            options = [] if problem.nearest is None or problem.field != key else [str(problem.nearest)]
            if value is not None:  # `true` or 1.5 may have been meant as text; `null` was not
                options.append(quoted(word.value_text))
            better = _accepted(key, options, vocabulary)
        nearest = better.partition("=")[2] if better else None
        ledger.found.append((word.index, Problem(field=problem.field, value=problem.value, rule=problem.rule,
                                                 nearest=nearest)))  # fmt: skip
        ledger.words[word.index] = better
        if better is None:
            ledger.dropped.append(key)


def _accepted(key: str, values: Sequence[str], vocabulary: Vocabulary) -> str | None:
    """The first `key=value` that the grammar and the key's type both take: a correction is never itself refused."""
    for text in values:
        parsed = parse(f"{key}={text}")
        if parsed is None or parsed.is_sweep_override() or key not in vocabulary.types:
            continue
        problems: list[Problem] = []
        convert(vocabulary.types[key], plain(parsed), field=key, problems=problems)
        if not problems:
            return f"{key}={text}"
    return None


def _sweep_values(parsed: Override) -> list[str]:
    try:
        return list(parsed.sweep_string_iterator())
    except HydraException:  # an interval, or a glob of something that is no group
        return []


def _unknown(word: Word, vocabulary: Vocabulary, ledger: Ledger, *, shown: object) -> None:
    note = vocabulary.elsewhere(word.key) if vocabulary.elsewhere else None
    near = None if note else closest_key(word.key, vocabulary.keys())
    better = f"{word.sign.replace('+', '')}{near}={word.value_text}" if near else None
    if near and word.parsed is not None and word.parsed.is_delete() and "=" not in word.text:
        better = f"~{near}"
    rule = f"unknown key; {note}" if note else "unknown key"
    if near in vocabulary.own:
        rule, better = "is not a key of this verb", None  # its own words are read elsewhere (`arguments.py`)
    ledger.wrong(word, rule=rule, value=shown, nearest=near, better=better)


def _unreadable(word: Word, vocabulary: Vocabulary, ledger: Ledger) -> None:
    if "=" not in word.text and not word.text.startswith("~"):
        better = _completed(word.key, vocabulary)
        ledger.wrong(word, rule="is not key=value", value=None, nearest=better, better=better)
        return
    key, text = word.key, word.value_text
    if not _known(key, vocabulary) and key not in vocabulary.groups:
        near = closest_key(key, vocabulary.keys())
        rule = "cannot be read, and is no key"
        ledger.wrong(word, rule=rule, value=text, nearest=near, better=f"{near}={text}" if near else None)
        return
    items = [item.strip() for item in text.strip("[]").split(",")]
    options = [quoted(text), "[" + ",".join(map(quoted, items)) + "]"]
    if text.startswith("[") and text.endswith("]"):
        options.reverse()
    better = _accepted(key, options, vocabulary)
    rule = "cannot be read; put quotes around special characters"
    ledger.wrong(word, rule=rule, value=text, nearest=better, better=better)


def _completed(word: str, vocabulary: Vocabulary) -> str | None:
    """What a word without `=` may have been the beginning or the end of."""
    for group, choices in vocabulary.groups.items():
        if word in choices and word not in vocabulary.groups:
            return f"{group}={word}"
    known = vocabulary.keys()
    near = word if word in known else closest_key(word, known) or ""
    if near in vocabulary.groups:
        return f"{near}={vocabulary.groups[near][0]}"
    there = _lookup(vocabulary.tree, near)
    return f"{near}={_text(there)}" if near in vocabulary.types and there is not None else None


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value if (o := parse(f"x={value}")) is not None and plain(o) == value else quoted(value)
    return Override._get_value_element_as_str(value)


def _lookup(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree


def _mergeable(parsed: Override) -> bool:
    return isinstance(plain(parsed), dict | list)

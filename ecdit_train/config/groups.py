"""Reads the words that choose (`group=choice`, `+group=choice`, `~group`) and Hydra's own (`hydra.searchpath=[...]`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ecdit_train.config.hydra_app import HydraApp
from ecdit_train.config.nearest import closest, closest_key
from ecdit_train.config.overrides import Ledger, Word, plain

LAUNCHERS = ("local", "slurm")
"""Hydra's own `basic` would run every job inside this process."""

HYDRA_KEYS = ("hydra.searchpath", "hydra.sweep.dir", "hydra.sweeper.", "hydra.launcher.")
"""What of Hydra's own configuration has a meaning here: keys, and beginnings of keys."""

HYDRA_GROUPS = ("hydra/launcher", "hydra/sweeper")

INSTEAD = {"hydra.run.dir": "run", "hydra.sweep.subdir": "run", "hydra.job.name": "experiment"}
"""Keys of Hydra's own that have another name here."""


def is_group_word(word: Word, groups: Mapping[str, Sequence[str]]) -> bool:
    """Whether a word chooses, rather than sets a value. `group={...}` sets values inside the group's section."""
    if word.parsed is None:
        return word.key in groups and "=" in word.text
    return (word.key in groups or "/" in word.key or word.parsed.package is not None) and not isinstance(
        word.parsed._value, dict
    )


def is_hydra_word(word: Word) -> bool:
    return word.key.startswith(("hydra.", "hydra/"))


# --- choices -----------------------------------------------------------------------------------------------------------


def read_choices(
    words: Sequence[Word], ledger: Ledger, *, groups: Mapping[str, Sequence[str]], sections: Sequence[str]
) -> dict[str, tuple[Word, str]]:
    """What is chosen (`group` or `group@package`) -> its word, and the word as Hydra is to get it; the last one wins.

    Args:
        words: those for which `is_group_word` holds.
        ledger: takes the wrong ones.
        groups: group -> its choices.
        sections: dotted names of the run's sections: a group of that name can be replaced, never left out.
    """
    good: dict[str, tuple[Word, str]] = {}
    for word in words:
        if word.key not in groups:
            near = closest(word.key, groups, cutoff=0.7)
            better = f"{word.sign}{near}={word.value_text}" if near else None
            ledger.wrong(word, rule="unknown group", value=word.value_text, nearest=near, better=better)
        elif (text := _read_choice(word, ledger, choices=groups[word.key], sections=sections)) is not None:
            target = word.parsed.get_key_element().lstrip("+~") if word.parsed else word.key
            good.pop(target, None)
            good[target] = (word, text)
    return good


def _read_choice(word: Word, ledger: Ledger, *, choices: Sequence[str], sections: Sequence[str]) -> str | None:
    """The word for Hydra; None after noting what is wrong."""
    group, parsed = word.key, word.parsed
    optional = group.replace("/", ".") not in sections
    if parsed is not None and parsed.is_sweep_override():
        try:
            first = next((v for v in parsed.sweep_string_iterator() if v in choices), None)
        except Exception:  # a glob or an interval: nothing to take the first of
            first = choices[0]
        better = f"{word.sign}{group}={first}" if first else None
        rule = "takes one choice; -m runs one job for each of several"
        ledger.wrong(word, rule=rule, value=word.value_text, nearest=better, better=better)
        return None
    if parsed is not None and (parsed.is_delete() or plain(parsed) is None):
        if optional:
            return word.text if parsed.is_delete() else f"~{group}"  # Hydra's way to say null
        rule = f"is a section that every run needs; choose one of {', '.join(choices)}"
        ledger.wrong(word, rule=rule, value=plain(parsed))
        return None
    if word.forces:
        better = f"{group}={word.value_text}"
        ledger.wrong(word, rule="groups take no `++`", value=word.value_text, nearest=better, better=better)
        return None
    value = word.value_text if parsed is None else plain(parsed)
    several = value if isinstance(value, list) else [value]
    unknown = [v for v in several if not isinstance(v, str | int | float) or str(v) not in choices]
    if not unknown:
        return word.text
    near = closest(str(unknown[0]), choices)
    better = f"{word.sign}{group}={near}" if near else None
    rule = f"unknown choice of {group}; there are " + ", ".join(choices)
    ledger.wrong(word, rule=rule, value=value, nearest=near, better=better)
    return None


# --- Hydra's own -------------------------------------------------------------------------------------------------------


def read_hydra(words: Sequence[Word], ledger: Ledger, *, app: HydraApp) -> list[str]:
    """The good ones of Hydra's own words."""
    good = []
    for word in words:
        before = len(ledger.found)
        value: Any = None if word.parsed is None else plain(word.parsed)
        if word.parsed is None:
            rule = "cannot be read; put quotes around special characters"
            ledger.wrong(word, rule=rule, value=word.value_text)
        elif word.parsed.is_sweep_override():
            ledger.wrong(word, rule="takes one value: Hydra's own keys cannot be swept", value=word.value_text)
        elif word.key == "hydra.searchpath":
            _searchpath(word, value, ledger)
        elif word.key in HYDRA_GROUPS:
            choices = LAUNCHERS if word.key == "hydra/launcher" else app.choices(word.key)
            if str(value) not in choices:
                near = closest(str(value), choices)
                rule = f"unknown choice of {word.key}; there are " + ", ".join(choices)
                better = f"{word.key}={near}" if near else None
                ledger.wrong(word, rule=rule, value=value, nearest=near, better=better)
        elif not word.key.startswith(HYDRA_KEYS):
            _unused(word, value, ledger)
        if len(ledger.found) == before:
            good.append(word.text)
    return good


def _searchpath(word: Word, value: Any, ledger: Ledger) -> None:
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        better = f"hydra.searchpath=[{word.value_text}]" if isinstance(value, str) else None
        ledger.wrong(word, rule="must be a list of folders", value=value, nearest=better, better=better)
        return
    missing = [v for v in value if not v.startswith("pkg://") and not Path(v.removeprefix("file://")).is_dir()]
    if missing:
        ledger.wrong(word, rule=f"{', '.join(missing)} is not a folder", value=value)


def _unused(word: Word, value: Any, ledger: Ledger) -> None:
    if other := INSTEAD.get(word.key):
        better: str | None = f"{other}={word.value_text}"
        ledger.wrong(word, rule=f"has no use here: {other} says it", value=value, nearest=better, better=better)
        return
    near = closest_key(word.key, HYDRA_KEYS[:2], cutoff=0.75)
    better = f"{near}={word.value_text}" if near and near != "hydra.searchpath" else None
    rule = "unknown key; of Hydra's own, these are used: " + ", ".join([*HYDRA_KEYS, *HYDRA_GROUPS])
    ledger.wrong(word, rule=rule, value=value, nearest=near, better=better)

"""What can fill each slot: the choices of its Hydra group, in the package and in the user's folder, with each one's keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ecdit_train.config.compose import open_app
from ecdit_train.config.convert import hints, type_name
from ecdit_train.config.resolve import field_docs, resolve
from ecdit_train.config.slots import SLOTS, TARGET, Slot, SlotConfig
from ecdit_train.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Key:
    """One key of a slot's class."""

    name: str
    type: str
    value: Any
    """What the YAML file says; None also where it says nothing."""
    meaning: str


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One file of a slot's group."""

    name: str
    target: str
    meaning: str
    keys: tuple[Key, ...]
    broken: str | None = None
    """Why its class cannot be used, if it cannot."""


def installed(*, config_dir: str | Path | None = None) -> dict[str, tuple[Choice, ...]]:
    """Slot -> its choices, by the slot's dotted key. A file whose class is not to be had is listed with the reason."""
    app = open_app(config_dir=config_dir)
    return {
        slot.key: tuple(
            choice
            for name in app.choices(slot.group)
            for choice in _choices(app.file(f"{slot.group}/{name}"), name, slot)
        )
        for slot in SLOTS
    }


def _choices(config: Any, name: str, slot: Slot) -> Iterator[Choice]:
    tree: Any = OmegaConf.to_container(config, resolve=False)
    for object_tree in tree.values() if slot.key.endswith(".*") else [tree]:
        target = str(object_tree.get(TARGET))
        try:
            cls = resolve(target, slot.base, field=slot.key)
        except ConfigError as error:
            yield Choice(name=name, target=target, meaning="", keys=(), broken=error.problems[0].rule)
        else:
            meaning = " ".join((cls.__doc__ or "").split("\n\n")[0].split())
            yield Choice(name=name, target=target, meaning=meaning, keys=_keys(cls, object_tree))


def _keys(cls: type[SlotConfig], tree: Mapping[str, Any]) -> tuple[Key, ...]:
    docs = field_docs(cls)
    return tuple(
        Key(name=name, type=type_name(hint), value=tree.get(name), meaning=docs.get(name, ""))
        for name, hint in hints(cls).items()  # type: ignore[arg-type]
    )


def text(found: Mapping[str, tuple[Choice, ...]]) -> str:
    """For people: a paragraph per slot."""
    lines = []
    for slot in SLOTS:
        lines.append(f"{slot.key.removesuffix('.*')}: {slot.meaning}   ({slot.group}=NAME)")
        for choice in found[slot.key]:
            lines.append(
                f"  {choice.name:<16}{choice.meaning if choice.broken is None else 'UNUSABLE: ' + choice.broken}"
            )
            lines.append(f"  {'':<16}{choice.target}")
            lines += [f"  {'':<16}{k.name} = {_plain(k.value)}: {k.type}. {k.meaning}" for k in choice.keys]
        lines.append("")
    return "\n".join(lines)


def _plain(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)

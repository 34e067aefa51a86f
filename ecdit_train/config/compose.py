"""YAML -> Hydra -> frozen dataclasses: the words of the command line become a run's configuration, or every reason why not.

A run is composed once, where it is submitted; every rank, requeue and resume then reads the `resolved.yaml` of its folder
(`stored.py` beside this file).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ecdit_train.config import groups as choosing
from ecdit_train.config.convert import from_dict, hints, key_types, to_dict
from ecdit_train.config.hydra_app import BROKEN, DictConfig, HydraApp, apply, chosen, from_tree, plain_tree
from ecdit_train.config.overrides import Ledger, Vocabulary, Word, plain, read_values, split
from ecdit_train.config.schema import RunConfig
from ecdit_train.config.user_folder import use_folder
from ecdit_train.config.validate import validate
from ecdit_train.errors import ConfigError, Problem

Rules = Callable[[RunConfig], object]


@dataclass(frozen=True, kw_only=True)
class Overridden:
    """A configuration and what the words of the command line had to do with it."""

    config: RunConfig
    explicit: frozenset[str]
    """Dotted keys that the words set, themselves or by choosing a group (for `check_resume`)."""


def conf_folder() -> Path:
    """The presets that belong to this package: `ecdit_train/conf`, in a checkout a link to the folder `conf/` beside it.

    Found from this file and not by a name of `sys.path`, so no `conf` of a working directory can take its place.
    """
    return Path(__file__).parents[1] / "conf"


def is_section(group: str) -> bool:
    """Whether a group fills a section of every run, or a part of one; `experiment` and `debug` do not."""
    hint = hints(RunConfig).get(group.split("/")[0].split("@")[0])
    return hint is not None and hint is not str


def open_app(words: Sequence[str] = (), *, config_dir: str | Path | None = None) -> HydraApp:
    """Hydra over the package's folder, the user's, and those that a `hydra.searchpath=[...]` word names.

    Raises:
        ConfigError: the user's folder is not there, or holds another file under a name of the package's.
    """
    searchpath = next((w for w in reversed(words) if w.lstrip("+").startswith("hydra.searchpath=")), None)
    if searchpath is not None:
        ledger = Ledger(words=[searchpath])
        searchpath = next(iter(choosing.read_hydra(split([searchpath]), ledger, app=HydraApp(conf_folder()))), None)
    folder = None if config_dir is None else use_folder(config_dir, conf=conf_folder())
    return HydraApp(conf_folder(), config_dir=folder, searchpath=searchpath)


def groups(*, config_dir: str | Path | None = None) -> Mapping[str, tuple[str, ...]]:
    """Hydra group -> its choices, sorted; `/` between the levels of nested groups."""
    return open_app(config_dir=config_dir).groups


# --- from words --------------------------------------------------------------------------------------------------------


def compose(overrides: Sequence[str], *, local: bool = True, config_dir: str | Path | None = None) -> RunConfig:
    """The configuration of the given words, e.g. `["experiment=ec_dit_xl_8e", "train.steps=10"]`.

    Types and keys are checked here; `configure` also checks the rules between them.

    Args:
        overrides: words of Hydra's grammar; the last one about a key wins.
        local: whether `conf/local/default.yaml` (git-ignored) takes part; off for golden files.
        config_dir: the user's folder.

    Raises:
        ConfigError: every unreadable word, unknown key, unknown choice and ill-typed value, with the nearest valid one.
    """
    return _configure(overrides, config_dir=config_dir, local=local).config


def configure(
    overrides: Sequence[str],
    *,
    world: int | Callable[[RunConfig], int] | None = None,
    config_dir: str | Path | None = None,
) -> Overridden:
    """`compose` and `validate` in one: every wrong word and every broken rule at once.

    Rules are asked about the configuration with all corrections made, so that one round of corrections is enough.

    Args:
        overrides: words of Hydra's grammar.
        world: number of ranks, or how it follows from the configuration; None skips the rules that need it.
        config_dir: the user's folder.

    Raises:
        ConfigError: as `compose` and `validate`.
    """
    return _configure(overrides, config_dir=config_dir, rules=partial(_check_rules, world=world))


def cluster_world(cfg: RunConfig) -> int:
    """Ranks of a run on its cluster."""
    return cfg.cluster.nodes * cfg.cluster.gpus_per_node


def _check_rules(cfg: RunConfig, *, world: int | Callable[[RunConfig], int] | None) -> None:
    validate(cfg, world=world(cfg) if callable(world) else world)


def _configure(
    overrides: Sequence[str], *, config_dir: str | Path | None, local: bool = True, rules: Rules | None = None
) -> Overridden:
    app = open_app(overrides, config_dir=config_dir)
    off = [] if local or "local" not in app.groups else ["~local"]
    return _Reader(app=app, start=partial(_compose_choices, app, off), config_dir=config_dir, rules=rules).read(
        overrides
    )


def override(
    cfg: RunConfig,
    overrides: Sequence[str],
    *,
    world: int | Callable[[RunConfig], int] | None = None,
    sections: Sequence[str] = (),
    own: Sequence[str] = (),
) -> Overridden:
    """`cfg` with words applied, without composing it again: what `resume RUN parallel=ep8 train.steps=900` means.

    A group's choice replaces its whole section. Groups without one (`experiment`, `debug`, `local`)
    cannot be applied afterwards.

    Args:
        cfg: a stored configuration.
        overrides: words of Hydra's grammar.
        world: as in `configure`.
        sections: the only sections that the words may change; none: all.
        own: keys of the verb's own, which a misspelt word may have meant.

    Raises:
        ConfigError: every wrong word and every broken rule.
    """
    app = open_app(overrides, config_dir=cfg.config_dir)
    reader = _Reader(
        app=app,
        start=partial(_replace_sections, app, cfg),
        config_dir=cfg.config_dir,
        rules=partial(_check_rules, world=world),
        sections=sections,
        own=own,
    )
    return reader.read(overrides)


def explicit_keys(overrides: Sequence[str], *, config_dir: str | Path | None = None) -> frozenset[str]:
    """Dotted keys that the words name, themselves or by choosing a group."""
    return _configure(overrides, config_dir=config_dir).explicit


Choices = Mapping[str, tuple[Word, str]]
Start = Callable[[Choices, Sequence[str], Ledger], DictConfig]


@dataclass(frozen=True, kw_only=True)
class _Reader:
    """Turns words into a configuration: choices first, since the keys depend on them, then values."""

    app: HydraApp
    start: Start
    """(choices, Hydra's own words, ledger) -> the tree that values are applied to; notes choices that do not fit."""
    config_dir: str | Path | None
    rules: Rules | None
    sections: Sequence[str] = ()
    own: Sequence[str] = ()

    def read(self, words: Sequence[str]) -> Overridden:
        """Raises one ConfigError: wrong words in the order of the command line, then what is wrong once they are right."""
        try:
            return self._read(words, rounds=4)
        except ConfigError as error:
            if not error.problems:
                raise
            place = {w.key: w.index for w in reversed(split(words))}
            raise ConfigError(sorted(error.problems, key=lambda p: place.get(p.field, len(words)))) from error

    def _read(self, words: Sequence[str], *, rounds: int) -> Overridden:
        ledger, groups, found = Ledger(words=list(words)), self.app.groups, split(words)
        own = choosing.read_hydra([w for w in found if choosing.is_hydra_word(w)], ledger, app=self.app)
        rest = [w for w in found if not choosing.is_hydra_word(w)]
        choosers = [w for w in rest if choosing.is_group_word(w, groups)]
        choices = choosing.read_choices(
            choosers, ledger, groups=groups, sections=[g.replace("/", ".") for g in groups if is_section(g)]
        )
        cfg = self.start(choices, own, ledger)
        if ledger.found:  # which keys there are is known once the choices are right
            raise ConfigError([*ledger.problems(), *self._after_correction(ledger, rounds=rounds)])
        tree = plain_tree(cfg.copy())
        vocabulary = Vocabulary(
            types={key: kind for key, kind in key_types(tree).items() if key != "config_dir"},
            tree=tree,
            groups=groups,
            sections=self.sections,
            own=self.own,
            elsewhere=partial(self._elsewhere, choices=choices, groups=groups),
        )
        values = read_values([w for w in rest if w not in choosers], vocabulary, ledger)
        if ledger.found:
            raise ConfigError([*ledger.problems(), *self._after_correction(ledger, rounds=rounds)])
        return Overridden(config=self._build(cfg, values), explicit=_explicit(choices, values, vocabulary.types))

    def _after_correction(self, ledger: Ledger, *, rounds: int) -> list[Problem]:
        """What would still be wrong; not what only follows from a word that no correction was found for."""
        if not rounds:
            return []
        try:
            self._read(ledger.corrected(), rounds=rounds - 1)
        except ConfigError as error:
            return [p for p in error.problems if not ledger.hides(p)]
        return []

    def _build(self, cfg: DictConfig, values: Sequence[Any]) -> RunConfig:
        try:
            apply(values, cfg)
            tree = plain_tree(cfg)
        except BROKEN as error:
            raise ConfigError(_does_not_compose(error)) from error
        if self.config_dir is not None:
            tree["config_dir"] = str(Path(self.config_dir).absolute())
        config: RunConfig = from_dict(tree)
        if self.rules is not None:
            self.rules(config)
        return config

    def _elsewhere(self, key: str, *, choices: Choices, groups: Mapping[str, Sequence[str]]) -> str | None:
        """Which other choice of a group has a key that this configuration lacks."""
        if key == "config_dir":
            return "--config-dir DIR says it"
        parts = key.split(".")
        for group in ("/".join(parts[:n]) for n in range(len(parts) - 1, 0, -1)):
            found = False
            for choice in groups.get(group, ()):
                if not self.app.has_keys_of_its_own(f"{group}/{choice}"):
                    continue
                words = [text for target, (_, text) in choices.items() if target != group]
                try:
                    tree = plain_tree(self.app.compose([*words, f"{group}={choice}"]))
                except BROKEN:
                    continue  # a nested group that has no place here: one level up then
                found = True
                if key in key_types(tree):
                    return f"{group}={choice} has it"
            if found:
                break
        return None


def _explicit(choices: Choices, values: Sequence[Any], types: Mapping[str, Any]) -> frozenset[str]:
    named = [target.split("@")[0].replace("/", ".") for target in choices] + [o.key_or_group for o in values]
    return frozenset(k for k in types for name in named if k == name or (k.startswith(f"{name}.")))


def _does_not_compose(error: Exception) -> Problem:
    causes = [" ".join(str(e).split()) for e in (error, error.__cause__) if e is not None and str(e)]
    return Problem(field="conf", value=None, rule="the configuration does not compose: " + "; ".join(causes))


# --- where values are applied to ---------------------------------------------------------------------------------------


def _compose_choices(
    app: HydraApp, off: Sequence[str], choices: Choices, own: Sequence[str], ledger: Ledger
) -> DictConfig:
    """The composed tree; a choice that Hydra refuses is noted and left out."""
    words = [*own, *off, *(text for target, (_, text) in choices.items() if not off or target != "local")]
    try:
        return app.compose(words)
    except BROKEN:
        pass  # one by one, to find which
    good = [*own, *off]
    try:
        base = app.compose(good)
    except BROKEN as error:
        raise ConfigError(_does_not_compose(error)) from error
    for target, (word, text) in sorted(choices.items(), key=lambda item: (is_section(item[0]), item[0].count("/"))):
        try:
            base = app.compose([*good, text])
            good.append(text)
        except BROKEN as error:
            _note_unfit(word, target, ledger, base=base, error=error)
    return base


def _note_unfit(word: Word, target: str, ledger: Ledger, *, base: DictConfig, error: Exception) -> None:
    """A choice that exists, and that Hydra cannot place."""
    value, listed = word.value_text, target in chosen(base)
    if word.sign == "+" and listed:
        better = f"{target}={value}"
        ledger.wrong(word, rule="has a choice already; `+` adds a group", value=value, nearest=better, better=better)
    elif word.sign == "~" and not listed:
        ledger.wrong(word, rule="is not in the defaults list: nothing to take away", value=value or None)
    elif not word.sign and not listed:
        added = None if is_section(target) else f"+{word.text}"
        parent, _, _ = target.rpartition("/")
        rule = "is not in the defaults list" + (
            f" of {parent}={chosen(base)[parent]}" if parent in chosen(base) else ""
        )
        ledger.wrong(word, rule=rule, value=value, nearest=added, better=added)
    else:
        ledger.wrong(word, rule=_does_not_compose(error).rule, value=value)


def _replace_sections(
    app: HydraApp, stored: RunConfig, choices: Choices, own: Sequence[str], ledger: Ledger
) -> DictConfig:
    """The stored tree with the sections of the chosen groups in place of its own."""
    tree: Any = to_dict(stored)
    fit = {}
    for target, (word, text) in choices.items():
        if is_section(target) and not word.sign:
            fit[target] = (word, text)
        else:
            rule = "cannot be changed after the run was made; set keys instead"
            ledger.wrong(word, rule=rule, value=None if word.parsed is None else plain(word.parsed))
    if fit:
        new = plain_tree(_compose_choices(app, (), fit, own, ledger))
        for target in sorted(fit, key=lambda t: t.count("/")):
            *parents, leaf = target.split("@")[0].split("/")
            source, place = new, tree
            for part in parents:
                source, place = source.get(part, {}), place.setdefault(part, {})
            if leaf in source:
                place[leaf] = source[leaf]
    return from_tree(tree)


# --- several jobs, and what Hydra prints -------------------------------------------------------------------------------


def expand(overrides: Sequence[str], *, config_dir: str | Path | None = None) -> list[list[str]]:
    """The words of every job that `-m` asks for, Hydra's own left out. Words that cannot be read are in every job.

    Raises:
        ConfigError: a range that has no end.
    """
    found = [w for w in split(overrides) if not choosing.is_hydra_word(w)]
    unread = [w.text for w in found if w.parsed is None]
    try:
        jobs = open_app(overrides, config_dir=config_dir).expand([w.text for w in found if w.parsed is not None])
    except BROKEN as error:
        raise ConfigError(_does_not_compose(error)) from error
    return [[*job, *unread] for job in jobs]


def for_hydra(overrides: Sequence[str], *, config_dir: str | Path | None = None) -> list[str]:
    """Checked words as Hydra itself is to get them; it refuses `group=null` and keys that a slot leaves to its default."""
    known = open_app(overrides, config_dir=config_dir).groups
    words = []
    for word in split(overrides):
        assert word.parsed is not None
        is_null = not word.parsed.is_sweep_override() and not word.parsed.is_delete() and plain(word.parsed) is None
        if choosing.is_group_word(word, known):
            words.append(f"~{word.key}" if is_null else word.text)
        elif choosing.is_hydra_word(word) or word.parsed.is_delete():
            words.append(word.text)
        else:
            words.append(f"++{word.key}={word.value_text}")
    return words

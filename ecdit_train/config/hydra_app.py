"""Hydra's machinery, without `hydra.main`: search path, groups, composition, `--cfg`, `--info` and sweeps.

The only file that uses Hydra's insides (Hydra is pinned; `tests/unit/config/test_hydra_app.py` fails where they move).
`hydra.main` itself is not used because it would make `outputs/` folders, configure logging, and end the process at the
first bad word. Nothing is left in `GlobalHydra`, `HydraConfig` or the root logger.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra._internal.config_repository import IConfigRepository
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

PRIMARY = "config"
"""The root of every composition: `conf/config.yaml`."""

BROKEN = (HydraException, OmegaConfBaseException, yaml.YAMLError, OSError, ValueError, TypeError)
"""What Hydra raises about words and YAML that do not compose."""

DEEPEST_GROUP = 3
"""Levels of folders in which groups are looked for; a user's folder may hold much else."""


_composed: dict[tuple[Any, ...], DictConfig] = {}
"""The package's own folder, the state of its one file that may change, and words -> what they compose to."""
_groups: dict[tuple[Any, ...], Mapping[str, tuple[str, ...]]] = {}
"""Folder and state as above -> its groups."""


def _changed(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


class HydraApp:
    """The configurations that one command sees: the package's, then the user's folder, then `hydra.searchpath`.

    Args:
        conf: the package's folder. What lies there cannot be replaced from elsewhere: the first one found wins.
        config_dir: the user's folder (`--config-dir`).
        searchpath: the `hydra.searchpath=[...]` word, if there is one.
    """

    def __init__(self, conf: Path, *, config_dir: Path | None = None, searchpath: str | None = None) -> None:
        version.setbase("1.3")
        search = create_config_search_path(f"file://{conf}")
        if config_dir is not None:  # as hydra.main places it
            search.prepend("command-line", f"file://{config_dir}", anchor=SearchPathQuery(provider="schema"))
        self.loader = ConfigLoaderImpl(config_search_path=search)
        self._searchpath = [searchpath] if searchpath else []
        self._conf, self._foreign = conf, bool(config_dir or searchpath)
        self._hydra = Hydra(task_name="ecdit", config_loader=self.loader)

    @cached_property
    def groups(self) -> Mapping[str, tuple[str, ...]]:
        """Group, `/` between levels -> its choices, sorted."""
        own = self._own()
        if own is None:
            return self._walked()
        if own not in _groups:
            _groups[own] = self._walked()
        return _groups[own]

    def _own(self) -> tuple[Any, ...] | None:
        """What everything found here follows from; None where it follows from a user's folder."""
        return None if self._foreign else (self._conf, _changed(self._conf / "local" / "default.yaml"))

    def _walked(self) -> Mapping[str, tuple[str, ...]]:
        found: dict[str, tuple[str, ...]] = {}

        def walk(parent: str, depth: int) -> None:
            for name in self._options(parent, ObjectType.GROUP):
                if name.startswith(("_", ".")) or (not parent and name == "hydra"):
                    continue
                group = f"{parent}/{name}" if parent else name
                if choices := self._options(group, ObjectType.CONFIG):
                    found[group] = tuple(sorted(choices))
                if depth < DEEPEST_GROUP:
                    walk(group, depth + 1)

        walk("", 1)
        return dict(sorted(found.items()))

    def _options(self, group: str, kind: ObjectType) -> list[str]:
        return self._repository.get_group_options(group, kind)

    @cached_property
    def _repository(self) -> IConfigRepository:
        """What `ConfigLoader.get_group_options` makes anew for every question."""
        return self.loader._parse_overrides_and_create_caching_repo(None, self._searchpath)[1]

    def choices(self, group: str) -> tuple[str, ...]:
        """Choices of one group, of Hydra's own too (`hydra/launcher`)."""
        return tuple(sorted(self._options(group, ObjectType.CONFIG)))

    def has_keys_of_its_own(self, path: str) -> bool:
        """Whether the file `group/choice` names a class, or takes in files that may: its keys are then its own."""
        result = self._repository.load_config(config_path=path)
        return result is not None and (bool(result.defaults_list) or "_target_" in result.config)

    def file(self, path: str) -> DictConfig:
        """What the file `group/choice` itself says, its defaults list left out."""
        result = self._repository.load_config(config_path=path)
        assert result is not None, f"{path} was listed"
        config: Any = result.config
        return config

    def compose(self, words: Sequence[str]) -> DictConfig:
        """The composed tree with its `hydra` node. Raises what Hydra and OmegaConf raise.

        Reading thirty files costs most of a second, and one command asks for the same words again: the package's own
        files do not change under a process, so what they compose to is kept.
        """
        own = (*state, *words) if (state := self._own()) is not None else None
        if own in _composed:
            return copy.deepcopy(_composed[own])
        composed: Any = self.loader.load_configuration(PRIMARY, list(words), RunMode.RUN, from_shell=False)
        if own is not None:
            _composed[own] = copy.deepcopy(composed)
        return composed

    @staticmethod
    def parser() -> OverridesParser:
        return OverridesParser.create()

    def expand(self, words: Sequence[str]) -> list[list[str]]:
        """The words of every job of a sweep: what Hydra's basic sweeper makes of them. Hydra's own words take no part."""
        read = OverridesParser.create(config_loader=self.loader).parse_overrides(list(words))
        (jobs,) = BasicSweeper.split_arguments(read, max_batch_size=None)
        return jobs

    def show(self, words: Sequence[str], *, cfg: str, package: str | None, resolve: bool) -> None:
        """Prints what `--cfg job|hydra|all` prints."""
        with untouched():
            self._hydra.show_cfg(PRIMARY, list(words), cfg, package, resolve)

    def info(self, words: Sequence[str], *, about: str) -> None:
        """Prints what `--info defaults|searchpath|...` prints."""
        with untouched():
            self._hydra.show_info(about, PRIMARY, list(words))

    def multirun(self, words: Sequence[str], task: Callable[..., Any]) -> None:
        """Hands the words to the chosen sweeper, which hands jobs to the chosen launcher, which gets `task`."""
        with untouched():
            self._hydra.multirun(PRIMARY, task, list(words), with_log_configuration=False)


def apply(values: Sequence[Override], cfg: DictConfig) -> None:
    """Sets the values in a composed tree as Hydra does, `+`, `++` and `~` included."""
    ConfigLoaderImpl._apply_overrides_to_config(list(values), cfg)
    if "hydra" in cfg:
        with open_dict(cfg.hydra):
            cfg.hydra.overrides.task = [o.input_line for o in values]
            cfg.hydra.job.override_dirname = get_overrides_dirname(list(values), [], ",", "=")


def from_tree(tree: Mapping[str, Any]) -> DictConfig:
    """A tree that values can be applied to."""
    return OmegaConf.create(dict(tree))


def plain_tree(cfg: DictConfig) -> dict[str, Any]:
    """The run's part of a composed tree as plain Python, interpolations resolved, `${hydra:...}` too."""
    with untouched():
        if "hydra" in cfg:
            HydraConfig.instance().set_config(cfg)
        with open_dict(cfg):
            cfg.pop("hydra", None)
        tree: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=False)
    return tree


def chosen(cfg: DictConfig) -> Mapping[str, str | None]:
    """Group (or `group@package`) -> the choice in the defaults list of a composed tree."""
    return dict(cfg.hydra.runtime.choices)


@contextmanager
def untouched() -> Iterator[None]:
    """Puts Hydra's global configuration and the root logger back as they were."""
    root, config = logging.getLogger(), HydraConfig.instance()
    before = (config.cfg, root.level, root.handlers[:])
    try:
        yield
    finally:
        config.cfg, level, root.handlers[:] = before
        root.setLevel(level)

"""YAML -> Hydra -> frozen dataclasses -> `resolved.yaml` -> frozen dataclasses. The only file that composes.

A run is composed once, where it is submitted; every rank, requeue and resume then reads `resolved.yaml`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ecdit_train.config.convert import from_dict, to_dict, with_values
from ecdit_train.config.schema import RunConfig
from ecdit_train.errors import ConfigError, RunFolderError

RESOLVED = "resolved.yaml"


@dataclass(frozen=True, kw_only=True)
class Overridden:
    """A stored configuration with words of the command line applied."""

    config: RunConfig
    explicit: frozenset[str]
    """Dotted keys that the words set (for `check_resume`)."""


def conf_folder() -> Path:
    """The presets that belong to this package: `ecdit_train/conf`, in a checkout a link to the folder `conf/` beside it.

    Found from this file and not by a name of `sys.path`, so no `conf` of a working directory can take its place."""
    return Path(__file__).parents[1] / "conf"


@cache
def groups() -> Mapping[str, tuple[str, ...]]:
    """Hydra group -> its choices, sorted; read from the folders of `conf`."""
    found = {
        folder.name: tuple(sorted(file.stem for file in folder.glob("*.yaml")))
        for folder in sorted(conf_folder().iterdir())
        if folder.is_dir() and not folder.name.startswith(("_", "."))
    }
    return {name: choices for name, choices in found.items() if choices}


def compose(overrides: Sequence[str], *, local: bool = True) -> RunConfig:
    """The configuration of the given words, e.g. `["experiment=ec_dit_xl_8e", "train.steps=10"]`.

    Types and keys are checked here, rules between sections in `validate`.

    Args:
        overrides: `key=value` and `group=choice` words; the last one about a key wins.
        local: whether `conf/local/default.yaml` (git-ignored) takes part; off for golden files.

    Raises:
        ConfigError: every unknown key, unknown choice and ill-typed value, with the nearest valid one.
    """
    words = list(overrides) + ([] if local or 'local' not in groups() else ['~local'])
    try:
        GlobalHydra.instance().clear()
        with initialize_config_dir(version_base="1.3", config_dir=str(conf_folder()), job_name="ecdit"):
            composed = hydra_compose(config_name="config", overrides=words)
        tree: Any = OmegaConf.to_container(composed, resolve=True, throw_on_missing=False)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"the configuration does not compose: {error}") from error
    return from_dict(tree)


def override(cfg: RunConfig, overrides: Sequence[str]) -> Overridden:
    """`cfg` with words applied, without composing it again: what `resume RUN parallel=ep8 train.steps=900` means.

    A group's choice replaces its whole section. `experiment`, `debug` and `local` cannot be applied afterwards.
    """
    values = {w.partition("=")[0]: yaml.safe_load(w.partition("=")[2]) for w in overrides}
    return Overridden(config=with_values(cfg, values), explicit=frozenset(values))


def explicit_keys(overrides: Sequence[str]) -> frozenset[str]:
    return frozenset(w.partition("=")[0] for w in overrides)


def _leaves(tree: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Dotted keys and values of a nested mapping."""
    found: list[tuple[str, Any]] = []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found += [(f"{key}.{inner}", v) for inner, v in _leaves(value)]
        else:
            found.append((key, value))
    return found


def to_yaml(cfg: RunConfig) -> str:
    """The whole configuration as YAML, in the schema's order."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(cfg)))  # quotes text that its own loader would read as a number


def freeze(cfg: RunConfig, folder: str | Path) -> Path:
    """Writes `folder/resolved.yaml` by one rename, so that no reader ever sees half of it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / RESOLVED
    handle, temporary = tempfile.mkstemp(prefix=f".{RESOLVED}.", dir=folder)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(to_yaml(cfg))
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def load(folder: str | Path) -> RunConfig:
    """The frozen configuration of a run folder; strict about keys and types.

    Raises:
        RunFolderError: no readable `resolved.yaml` there.
        ConfigError: its keys or types are wrong (another version wrote it, or a person edited it).
    """
    path = Path(folder) / RESOLVED
    try:
        tree: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except FileNotFoundError as error:
        raise RunFolderError(f"{folder} is not a run folder: it has no {RESOLVED}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise RunFolderError(f"{path} cannot be read: {error}") from error
    return from_dict(tree)

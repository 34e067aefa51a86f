"""`resolved.yaml`: the configuration of a run folder, frozen when the run was made, read by every later attempt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ecdit_train import atomic
from ecdit_train.config.convert import from_dict, to_dict
from ecdit_train.config.schema import RunConfig
from ecdit_train.config.upgrade import FORMAT, KEY, upgrade
from ecdit_train.config.user_folder import as_given, trust, use_folder
from ecdit_train.errors import RunFolderError
from ecdit_train.run_folder import RESOLVED


def to_yaml(cfg: RunConfig) -> str:
    """The whole configuration as YAML, in the schema's order."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(cfg)))  # quotes text that its own loader would read as a number


def freeze(cfg: RunConfig, folder: str | Path) -> Path:
    """Writes `folder/resolved.yaml` with its format number by one rename, so that no reader ever sees half of it."""
    path = Path(folder) / RESOLVED
    if cfg.config_dir is not None:
        cfg = replace(cfg, config_dir=as_given(cfg.config_dir, run=Path(folder)))
    atomic.write(path, f"{KEY}: {FORMAT}\n{to_yaml(cfg)}".encode())
    return path


def read_tree(folder: str | Path) -> dict[str, Any]:
    """The YAML tree of a run folder, unchecked; nothing that it names is imported.

    Raises:
        RunFolderError: no readable `resolved.yaml` there.
    """
    path = Path(folder) / RESOLVED
    try:
        tree: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except FileNotFoundError as error:
        raise RunFolderError(f"{folder} is not a run folder: it has no {RESOLVED}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise RunFolderError(f"{path} cannot be read: {error}") from error
    if not isinstance(tree, dict):
        raise RunFolderError(f"{path} cannot be read: it holds no configuration")
    return tree


def load(folder: str | Path, *, config_dir: str | Path | None = None) -> RunConfig:
    """The frozen configuration of a run folder; strict about keys and types.

    Args:
        folder: the run folder.
        config_dir: where the user's modules are; default where the run had them, if the run folder is the user's own.

    Raises:
        RunFolderError: no readable `resolved.yaml` there, or it wants modules from a folder that is not to be trusted.
        ConfigError: its keys or types are wrong (another version wrote it, or a person edited it).
    """
    tree = upgrade(read_tree(folder), where=str(Path(folder) / RESOLVED))
    if config_dir is not None:
        tree["config_dir"] = str(use_folder(config_dir))
    elif tree.get("config_dir"):
        trust(tree["config_dir"], run=Path(folder))
    return from_dict(tree)

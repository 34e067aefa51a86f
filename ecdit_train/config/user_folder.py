"""A user's own folder (`--config-dir`): YAML of groups and experiments, and the Python modules that they name."""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path

from ecdit_train.errors import ConfigError, Problem, RunFolderError
from ecdit_train.lineage import SNAPSHOT
from ecdit_train.run_folder import CODE, RESOLVED


def use_folder(folder: str | Path, *, conf: Path | None = None) -> Path:
    """Makes the folder's modules importable, behind everything that is installed; returns it absolute.

    Args:
        folder: holds `GROUP/CHOICE.yaml` and `MODULE.py`.
        conf: the package's own configurations, to refuse names that would be looked up there first.

    Raises:
        ConfigError: no such folder, or files that the package's hide.
    """
    path = Path(folder).absolute()
    if not path.is_dir():
        raise ConfigError(Problem(field="--config-dir", value=str(folder), rule="is not a folder"))
    if conf is not None and conf.resolve() != path.resolve():
        ours = (file.relative_to(conf) for file in conf.rglob("*.yaml"))
        hidden = [str(f) for f in ours if (path / f).is_file() and (path / f).read_bytes() != (conf / f).read_bytes()]
        if hidden:
            rule = f"{', '.join(sorted(hidden))} would not be read: ecdit has a file of that name; choose another"
            raise ConfigError(Problem(field="--config-dir", value=str(folder), rule=rule))
    if str(path) not in sys.path:
        sys.path.append(str(path))  # never in front: a user's `torch.py` must not replace torch
    return path


def trust(stored: str, *, run: Path) -> None:
    """Uses the folder that a run folder names, if run and folder are the user's own: its modules will be executed.

    Raises:
        RunFolderError: the run, its `resolved.yaml` or the folder it names belongs to somebody else or may be written by
            everybody; the folder lies inside the run (whoever sent one sent the other), is not absolute, or is gone.
    """
    folder = Path(stored)
    inside = folder.is_absolute() and folder.resolve().is_relative_to(run.resolve())
    if not folder.is_absolute() or inside or not all(map(_is_own, (run, run / RESOLVED, folder))):
        raise RunFolderError(
            f"{run} wants modules from {stored}, which would be executed, and not all of that is yours alone: "
            "give --config-dir FOLDER if you trust them"
        )
    try:
        use_folder(stored)
    except ConfigError as error:
        raise RunFolderError(
            f"{run} was made with --config-dir {stored}, which is gone: say where it is now"
        ) from error


def as_given(folder: str, *, run: Path) -> str:
    """Where the user has the folder. A job reads the copy in its run's code snapshot, and that is not what the run
    remembers: nobody trusts modules that lie inside a run folder."""
    code, path = (run / CODE).resolve(), Path(folder).resolve()
    if not path.is_relative_to(code) or path == code:
        return folder
    return str(json.loads((code / path.relative_to(code).parts[0] / SNAPSHOT).read_bytes())["config_dir"])


def _is_own(path: Path) -> bool:
    """Belongs to the user, and not everybody may write it; what is not there is left to who uses it."""
    if not path.exists():
        return True
    status = path.stat()
    return status.st_uid == os.geteuid() and not status.st_mode & stat.S_IWOTH

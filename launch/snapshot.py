"""The code a job runs: a copy in the run folder, so that an edit never changes the next life.

<run>/code/0123456789ab/       named by its content: an unchanged tree is not copied twice
    ecdit_train/, data_pipeline/, launch/, hydra_plugins/
    config_dir/                the user's own folder (`--config-dir`), if there is one
    snapshot.json              commit, folders it was made of
    diff.patch                 how the tree differs from that commit

What would carry a secret is never copied: hidden files and those that are named like keys are left out, and a file that holds
something of a secret's form refuses the launch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ecdit_train
from ecdit_train import lineage
from ecdit_train.errors import ConfigError, Problem
from ecdit_train.run_folder import CODE
from ecdit_train.secrets import in_file

PACKAGES = ("ecdit_train", "data_pipeline", "launch")
PLUGINS = "hydra_plugins/ecdit_*.py"
"""Among those of other packages."""
CONFIG_DIR = "config_dir"

TEXT = {".py", ".yaml", ".yml", ".json", ".txt", ".toml", ".cfg", ".ini", ".csv", ".md"}
"""What is taken of the user's folder: not the pictures and weights that may lie there."""
LARGEST = 1 << 20
"""Bytes of one file of the user's folder; a larger one is data."""
_NOT_CODE = ("resolved.yaml", "manifest.json", "pyvenv.cfg")
"""Marks of a run folder, a data set, an environment: such a folder is left out."""
_LEFT_OUT = re.compile(
    r"\..*|__pycache__|.*\.(pem|key|p12|pfx|pyc)|id_(rsa|dsa|ecdsa|ed25519).*|(credentials?|secrets?)\.(?!py$)[^.]*"
)


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What is copied, read but not yet written."""

    id: str
    files: dict[str, bytes]
    """Path inside the snapshot -> content."""
    config_dir: str | None
    """The user's folder as it was given."""

    def folder(self, run: Path) -> Path:
        return run / CODE / self.id

    def words(self, run: Path) -> tuple[str, ...]:
        """What a command is told so that it reads the copy of the user's folder."""
        return ("--config-dir", str(self.folder(run) / CONFIG_DIR)) if self.config_dir else ()

    def write(self, run: Path) -> Path | None:
        """Puts the copy into the run folder by one rename; its folder, or None where it was there."""
        folder = self.folder(run)
        if folder.exists():
            return None
        temporary = folder.with_name(f".{self.id}-{os.getpid()}")
        try:
            for name, content in self.files.items():
                path = temporary / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
                path.chmod(0o444)
            temporary.rename(folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        return folder


def take(*, config_dir: str | None, root: Path | None = None) -> Snapshot:
    """Reads the running package and the user's folder.

    Args:
        config_dir: the user's folder, absolute.
        root: where the packages lie; default those that run.

    Raises:
        ConfigError: a file holds what looks like a secret; it is named, not shown.
    """
    root = Path(ecdit_train.__file__).parents[1] if root is None else root
    files: dict[str, bytes] = {}
    for package in PACKAGES:
        files |= {f"{package}/{name}": path.read_bytes() for name, path in _files(root / package, follow=True)}
    files |= {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.glob(PLUGINS))}
    if config_dir is not None:
        for name, path in _files(Path(config_dir), follow=False):
            if path.suffix in TEXT and path.stat().st_size <= LARGEST:
                files[f"{CONFIG_DIR}/{name}"] = path.read_bytes()
    _refuse_secrets(files, root=root, config_dir=config_dir)
    git, diff = lineage.git(root), lineage.diff(root)
    if diff and in_file(diff.decode(errors="replace")) is None:
        files[lineage.PATCH] = diff
    told = {"git": git, "config_dir": config_dir}
    content = hashlib.sha256(json.dumps(told).encode())
    for name in sorted(files):
        content.update(f"\0{name}\0{len(files[name])}\0".encode() + files[name])
    files[lineage.SNAPSHOT] = (json.dumps({"format": 1, **told}, indent=1) + "\n").encode()
    return Snapshot(id=content.hexdigest()[:12], files=files, config_dir=config_dir)


def _files(folder: Path, *, follow: bool) -> Iterator[tuple[str, Path]]:
    """(path inside, path) of every file that may be copied. `follow`: `ecdit_train/conf` is a link in a checkout; a
    user's links may lead anywhere."""
    for where, folders, names in os.walk(folder, followlinks=follow):
        inside = Path(where).relative_to(folder)
        if not follow and any(name in names for name in _NOT_CODE):
            folders.clear()
            continue
        local = inside == Path("conf")  # conf/local is somebody's account and paths
        folders[:] = sorted(n for n in folders if not _LEFT_OUT.fullmatch(n) and not (local and n == "local"))
        for name in sorted(names):
            if not _LEFT_OUT.fullmatch(name) and (follow or not (Path(where) / name).is_symlink()):
                yield str(inside / name), Path(where) / name


def _refuse_secrets(files: dict[str, bytes], *, root: Path, config_dir: str | None) -> None:
    problems = []
    for name, content in files.items():
        if (found := in_file(content.decode(errors="replace"))) is not None:
            line, what = found
            own = name.startswith(f"{CONFIG_DIR}/")
            where = Path(config_dir or "", name.partition("/")[2]) if own else root / name
            rule = f"holds {what}, and the code is copied into the run folder: take it out, export it in your shell"
            problems.append(Problem(field=str(where), value=f"line {line}", rule=rule))
    if problems:
        raise ConfigError(problems)

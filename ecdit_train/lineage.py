"""What made a checkpoint: the code, the libraries, the attempt. For people; nothing is decided by it."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

LIBRARIES = ("ecdit", "torch", "numpy", "megatron-core", "deepspeed", "transformers", "diffusers", "safetensors")

SNAPSHOT = "snapshot.json"
"""Beside the packages that `ecdit launch` copied: which commit they are of."""
PATCH = "diff.patch"
"""Beside it: how they differ from that commit."""


def here(*, attempt: int) -> dict[str, Any]:
    """JSON: `git` (commit, whether files differ from it, a digest of the difference; null outside
    a repository), versions, attempt."""
    return {"attempt": attempt, "python": platform.python_version(), "libraries": _versions(), "git": git()}


def git(folder: Path | None = None) -> dict[str, Any] | None:
    """Of the source tree that runs, or that the running copy was made of; None for an installed package."""
    folder = folder or Path(__file__).parents[1]
    if (folder / SNAPSHOT).exists():
        known: dict[str, Any] = json.loads((folder / SNAPSHOT).read_bytes())
        return known["git"]
    if not (folder / ".git").exists():
        return None
    commit, diff = _git(folder, "rev-parse", "HEAD"), _git(folder, "diff", "HEAD")
    if commit is None or diff is None:
        return None
    changed = bool(diff)
    return {
        "commit": commit.decode().strip(),
        "changed": changed,
        "diff_sha256": hashlib.sha256(diff).hexdigest() if changed else None,
    }


def diff(folder: Path | None = None) -> bytes:
    """The difference itself, of files that git knows; empty for a copy whose difference holds a secret."""
    folder = folder or Path(__file__).parents[1]
    if (folder / SNAPSHOT).exists():
        return (folder / PATCH).read_bytes() if (folder / PATCH).exists() else b""
    return _git(folder, "diff", "HEAD") or b""


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What made a checkpoint and what goes on from it, where they differ: "torch: 2.11.0 -> 2.13.0"."""
    old, new = _flat(before), _flat(now)
    return [f"{name}: {old[name]} -> {new[name]}" for name in old if name in new and old[name] != new[name]]


def _flat(made: Mapping[str, Any]) -> dict[str, Any]:
    git = made.get("git") or {}
    code = f"{str(git['commit'])[:12]}{' with changes' if git.get('changed') else ''}" if git else None
    found = {"python": made.get("python"), "code": code, **(made.get("libraries") or {})}
    return {name: value for name, value in found.items() if value is not None}


def _git(folder: Path, *words: str) -> bytes | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found

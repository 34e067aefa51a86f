"""What became of a data set: its manifest of earlier, held against the one of today."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from data_pipeline.errors import DataError
from data_pipeline.manifest import View, read_manifest

_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Changes:
    """Names of shards."""

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    edited: tuple[str, ...] = ()

    @property
    def grown(self) -> bool:
        """Whether all that was there is there unchanged."""
        return not self.removed and not self.edited

    def __str__(self) -> str:
        parts = [
            f"{len(names)} {what} ({_few(names)})"
            for what, names in (("added", self.added), ("removed", self.removed), ("edited", self.edited))
            if names
        ]
        return ", ".join(parts) or "the same shards under another manifest"


def changes(before: View, *, now: View) -> Changes:
    """Of shards, by name and sum."""
    old, new = ({row.name: row.sha256 for row in view.shards} for view in (before, now))
    return Changes(
        added=tuple(name for name in new if name not in old),
        removed=tuple(name for name in old if name not in new),
        edited=tuple(name for name in new if name in old and old[name] != new[name]),
    )


def advice(view: View, *, wanted_sha256: str) -> str:
    """What a run on the manifest `wanted_sha256` can do where the folder now holds `view`: a sentence or two."""
    other = (
        f"The shards in {view.place} are not those that the run was trained on (their manifest's fingerprint differs)"
    )
    weights = "start a new run from this one's weights (train.init_from)"
    try:
        before = _earlier(view, wanted_sha256)
    except DataError:
        return f"{other}: point data.shards at an unchanged copy, or {weights}"
    changed = changes(before, now=view)
    if changed.grown:
        rule = f"data.manifest={wanted_sha256[:12]} goes on with those alone"
        return f"{other}. Since then: {changed}. All shards of then are here unchanged: {rule}; or {weights}"
    lost = (*changed.removed, *changed.edited)
    return (
        f"{other}. Since then: {changed}. Put back {_few(lost)} as they were and run `ecdit data index`, or {weights}"
    )


def _earlier(view: View, sha256: str) -> View:
    """In the folder of the indexes, or where the tars lie."""
    try:
        return read_manifest(view.folder, which=sha256)
    except DataError:
        if not view.base:
            raise
        return read_manifest(view.base, which=sha256)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")

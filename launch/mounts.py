"""Which folders a container must see, and where a path of the configuration lies outside of it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from ecdit_train.config.schema import RunConfig
from ecdit_train.config.validate import slots_of
from ecdit_train.errors import ConfigError, Problem


def mounts(cfg: RunConfig, *, run: str, cwd: str) -> tuple[tuple[str, str], ...]:
    """(outside, inside) of the working directory, the run folder, every path that the configuration names, what it asks for itself,
    and where links among them lead. None lies inside another.

    Raises:
        ConfigError: a path that a container's flags cannot carry.
    """
    own = [_pair(text) for text in cfg.cluster.mounts]
    found: dict[str, str] = {inside: out for out, inside in own}
    slots = [path for slot in slots_of(cfg).values() for path in slot.paths()]
    sources = cfg.data.named.values()
    data = [path for source in sources for path in (source.shards, *source.keep)]
    if cfg.data.order == "streamed" and not cfg.data.shards.startswith("pipe:"):
        data.append(os.path.dirname(cfg.data.shards.partition("{")[0]) if "{" in cfg.data.shards else cfg.data.shards)
    data += [bucket.samples for bucket in cfg.data.buckets.values()]
    for path in (cwd, run, *data, *cfg.data.take_down, cfg.train.init_from, *slots):
        if path is None or "://" in path:
            continue
        seen = os.path.normpath(os.path.join(cwd, path))
        for place in dict.fromkeys((seen, os.path.realpath(seen))):
            if not any(_is_in(place, inside) for inside in found):
                found = {i: o for i, o in found.items() if o != i or not _is_in(i, place)}
                found[place] = place
    if bad := [place for place in found if set(place) & set(',:"')]:
        rule = 'lies where no container can be told to look: no , : or " in its path'
        raise ConfigError([Problem(field="cluster.container", value=place, rule=rule) for place in bad])
    return tuple((out, inside) for inside, out in found.items())


def outside(path: str, *, mounts: Iterable[str], cwd: str | None = None) -> Path:
    """Where a path that the ranks use lies on this machine."""
    seen = os.path.normpath(os.path.join(cwd or os.getcwd(), path))
    for text in mounts:
        out, inside = _pair(text)
        if _is_in(seen, inside):
            return Path(os.path.normpath(os.path.join(out, os.path.relpath(seen, inside))))
    return Path(seen)


def as_flag(pairs: Sequence[tuple[str, str]]) -> str:
    """As pyxis and Apptainer both take them."""
    return ",".join(f"{out}:{inside}" for out, inside in pairs)


def _pair(text: str) -> tuple[str, str]:
    out, _, inside = text.partition(":")
    return os.path.normpath(out), os.path.normpath(inside or out)


def _is_in(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f"{folder.rstrip('/')}/")

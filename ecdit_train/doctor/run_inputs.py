"""What a run reads and whom it tells: shards, encoders, W&B."""

from __future__ import annotations

import os
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ecdit_train.config.convert import to_dict
from ecdit_train.config.schema import RunConfig
from ecdit_train.doctor.findings import Check, Finding, fail, ok, warning
from ecdit_train.observe import reach
from launch import inputs
from launch.mounts import outside

SHOWN_SHARDS = 20


def checks(cfg: RunConfig | None) -> list[Check]:
    """`cfg`: None where no run is asked about."""
    hangs = "the file system of the data does not answer: ask its operators"
    about_run = [
        Check(what="inputs", ask=lambda: there(cfg), hangs=hangs),
        Check(what="shards", ask=lambda: shards(cfg), hangs=hangs),
    ]
    return [
        *(about_run if cfg is not None else []),
        Check(
            what="wandb",
            ask=lambda: wandb(None if cfg is None else mode(cfg)),
            hangs="a name server or proxy does not answer",
        ),
    ]


def there(cfg: RunConfig | None) -> Iterator[Finding]:
    """As `ecdit launch` asks: what the configuration names is there, and the run folder can be written."""
    assert cfg is not None
    problems = list(inputs.problems(cfg))
    for problem in problems:
        yield fail("inputs", f"{problem.field} = {problem.value!r}: {problem.rule}", f"make it, or set {problem.field}")
    if not problems:
        yield ok("inputs", "data, encoders and the run folder are there")


def shards(cfg: RunConfig | None) -> Iterator[Finding]:
    """The data set opens, and its first shards can be read by us."""
    assert cfg is not None
    from data_pipeline.manifest import MANIFEST

    for source in cfg.data.named.values():
        if "://" in source.shards:
            yield from _set(source.shards, which=source.manifest)
            continue
        folder = outside(source.shards, mounts=cfg.cluster.mounts if cfg.cluster.container else ())
        if (folder / MANIFEST).is_file():  # else said by `there`
            yield from _set(folder, which=source.manifest)


def _set(place: Path | str, *, which: str | None) -> Iterator[Finding]:
    from data_pipeline.errors import DataError
    from data_pipeline.manifest import open_view

    try:
        view = open_view(place, which=which)
        for shard in range(0 if view.base else min(SHOWN_SHARDS, len(view.shards))):
            with view.tar(shard).open("rb") as file:
                file.read(1)
    except (DataError, OSError) as error:
        yield fail("shards", str(error), "docs/runbook/bad-shards.md; ecdit data verify reads every byte")
        return
    yield ok("shards", f"{view.num_samples} samples in {len(view.shards)} shards; ecdit data verify reads every byte")


def mode(cfg: RunConfig) -> str | None:
    """Of the W&B sink; None where the run has none."""
    sinks: Mapping[str, Any] = to_dict(cfg)["observe"]["sinks"]
    return next((str(s["mode"]) for s in sinks.values() if "wandb" in str(s.get("_target_", "")).lower()), None)


def wandb(wanted: str | None, *, environ: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Whether somebody answers, and whether there is a key; that is never shown. `wanted`: the sink's mode."""
    where = reach.address(environ)
    way = f" through the proxy {where.proxy}" if where.proxy else ""
    key = reach.key(environ=environ)
    if wanted != "online":
        how = "offline: files under RUN/wandb, ecdit dash sync sends them" if wanted else "no W&B sink in this run"
        yield ok("wandb", f"{how}; {key or 'no key'} here" if wanted else how)
        return
    fix = "observe.sinks.wandb.mode=offline, and ecdit dash sync from a machine with internet; metrics.jsonl has everything anyway"
    if reach.answers(environ=environ):
        yield ok("wandb", f"{where.host} answers{way}")
    else:
        yield warning("wandb", f"{where.host} does not answer{way} within {reach.PROBE_SECONDS:g} s", fix)
    if key is None:
        yield fail(
            "wandb key",
            "none, and the run is online",
            "wandb login, or export WANDB_API_KEY in the shell that launches; never in a configuration",
        )
    else:
        yield ok("wandb key", key)
    if where.proxy is None and (others := sorted(urllib.request.getproxies())):
        yield ok("proxies", f"set for {', '.join(others)}, not used for {where.host}")

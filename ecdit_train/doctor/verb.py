"""What `ecdit doctor` does: ask everything at once, print a table, fail where something fails."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from ecdit_train import errors
from ecdit_train.config.resolve import declarations_only
from ecdit_train.config.schema import RunConfig
from ecdit_train.doctor import cluster, findings, machine, run_inputs, software, storage
from ecdit_train.doctor.findings import Check, Finding
from ecdit_train.errors import EcditError, RunFolderError, UnfitError
from ecdit_train.run_folder import RESOLVED
from launch import inputs

DOCTOR = """whether this machine, the cluster and a run are fit for each other: one line each, with how to mend it

  ecdit doctor
  ecdit doctor runs/xl_8e
  ecdit doctor experiment=ec_dit_xl_8e cluster=h100_ib400 cluster.nodes=4 run=runs/xl_8e data.shards=data/images

Exit code: 0 where nothing fails (warnings are only told), 90 where something does."""


def declare(verb: Callable[..., argparse.ArgumentParser], *, words: Callable[[argparse.ArgumentParser], None]) -> None:
    """The words of `doctor`."""
    p = verb("doctor", doctor, DOCTOR)
    words(p)
    p.add_argument("--json", action="store_true", help="print one JSON object instead of the table")


def doctor(args: argparse.Namespace) -> int:
    with declarations_only():
        found = examine(args.overrides, config_dir=args.config_dir)
    if args.json:
        print(json.dumps({"worst": findings.worst(found), "checks": [asdict(one) for one in found]}, indent=1))
    else:
        print(table(found))
    if bad := [one.what for one in found if one.state == "fail"]:
        raise UnfitError(f"{len(bad)} of {len(found)} checks failed: {', '.join(dict.fromkeys(bad))}")
    return errors.EXIT_OK


def examine(words: Sequence[str], *, config_dir: str | None) -> list[Finding]:
    """All findings about this machine and the run that the words name: a folder, words of a configuration, or nothing."""
    folder = Path(words[0]) if words and "=" not in words[0] and not words[0].startswith(("~", "+")) else None
    first: list[Finding] = []
    cfg: RunConfig | None = None
    try:
        cfg = _configuration(folder, words[folder is not None :], config_dir=config_dir)
    except RunFolderError:
        raise
    except EcditError as error:
        first = [
            findings.fail("configuration", line, "docs/runbook/config-refused.md") for line in str(error).splitlines()
        ]
    return first + findings.run(every(cfg, folder=folder))


def _configuration(folder: Path | None, words: Sequence[str], *, config_dir: str | None) -> RunConfig | None:
    from ecdit_train.config import compose, stored

    if folder is not None:
        if not (folder / RESOLVED).exists():
            raise RunFolderError(f"{folder} is not a run folder: it has no {RESOLVED}")
        old = replace(stored.load(folder, config_dir=config_dir), run=str(folder))
        return compose.override(old, words, world=compose.cluster_world).config if words else old
    if not words:
        return None
    return compose.configure(words, world=compose.cluster_world, config_dir=config_dir).config


def every(cfg: RunConfig | None, *, folder: Path | None) -> list[Check]:
    run = Path(cfg.run) if cfg is not None else folder or Path()
    room = cfg.cluster if cfg is not None else None
    nodes = room.nodes if room is not None else 1
    gpus = None if room is None or room.gpu == "cpu" else room.gpus_per_node
    told = software.checks(wants_gpus=gpus)
    if room is not None and (room.container is not None or room.python is not None):
        # What this interpreter can do says nothing of the ranks'.
        elsewhere = room.container or room.python
        told = [
            told[0],
            Check(
                what="torch", ask=lambda: [findings.ok("torch", f"the ranks': in {elsewhere}; not looked at from here")]
            ),
        ]
    return [
        *told,
        *machine.checks(wanted_interface=room.interface if room is not None else None, nodes=nodes),
        *storage.checks(run, size=lambda: 0.0 if cfg is None else inputs.checkpoint_bytes(cfg), nodes=nodes),
        *cluster.checks(room, run=folder or (run if cfg is not None else None)),
        *run_inputs.checks(cfg),
    ]


def table(found: Sequence[Finding]) -> str:
    """`ok|warning|fail   what   found`, and below it what to do."""
    width = max((len(one.what) for one in found), default=0)
    lines = []
    for one in found:
        lines.append(f"{one.state:<8} {one.what:<{width}}  {one.found}")
        if one.fix:
            lines.append(f"{'':<8} {'':<{width}}  -> {one.fix}")
    counts = {state: sum(one.state == state for one in found) for state in findings.ORDER}
    return "\n".join([*lines, "", ", ".join(f"{number} {state}" for state, number in counts.items())])

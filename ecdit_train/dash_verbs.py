"""What `ecdit dash` does: bring a run to W&B, and keep the project's dashboards as the package defines them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ecdit_train import errors
from ecdit_train.errors import ConfigError, Problem, RunOwnedError
from ecdit_train.run_folder import CHECKPOINTS, by_step
from ecdit_train.supervise import lease, lives


def declare(verb: Callable[..., argparse.ArgumentParser], group: Any) -> None:
    """The words of the group."""
    p = verb(
        "sync",
        sync,
        "send to W&B what it lacks of a run: rows, pictures and evaluations, whichever of its lives were offline; as often as you\n"
        "like, also while an offline run trains (a login node's cron job makes its curves live)\n\n"
        "  ecdit dash sync runs/xl8e",
        parent=group,
    )
    p.add_argument("run", help="run folder")
    p.add_argument(
        "--all",
        action="store_true",
        help="rows after the newest checkpoint, too: for a run that will not be resumed, as W&B cannot take them back",
    )
    _place(p)


def _place(p: argparse.ArgumentParser) -> None:
    p.add_argument("--project", help="W&B project (default: the run's own)")
    p.add_argument("--entity", help="W&B user or team (default: the run's own, else the login's)")


def sync(args: argparse.Namespace) -> int:
    run = Path(args.run)
    config, sink = _of_run(run, args)
    from ecdit_train.config.convert import to_dict
    from ecdit_train.observe import reach
    from ecdit_train.observe.sinks import SinkContext
    from ecdit_train.observe.wandb_sync import offline_folders
    from ecdit_train.observe.wandb_sync import sync as send

    if reach.key() is None:
        folders = ", ".join(str(path) for path in offline_folders(run)[-3:]) or f"{run}/metrics.jsonl"
        rule = (
            f"sending needs a login of W&B (wandb login, or WANDB_API_KEY in the environment). Nothing is lost: {folders} and the "
            "run's own log are there; copy the run folder to where there is one, and say this again"
        )
        raise ConfigError(Problem(field="WANDB_API_KEY", value=None, rule=rule))
    alive = _alive(run)
    if alive and sink.mode == "online":
        raise RunOwnedError(f"{run} is at work and online: it sends its rows itself, with each checkpoint")
    committed = max((step for step, path in by_step(run / CHECKPOINTS, suffix="") if path.is_dir()), default=0)
    known = lives.read(run)
    about = SinkContext(
        folder=run,
        name=config.experiment,
        config=to_dict(config),
        resume_step=1 << 62 if args.all else committed,
        life=known[-1].number if known else 0,
    )
    done = send(about, sink, alive=alive)
    print(f"rows         {done.rows} sent; W&B had the run up to step {done.had}, now up to {done.has}")
    if done.waiting:
        print(
            f"waiting      {done.waiting} rows after the newest checkpoint (step {committed}): "
            "a resume may train those steps again; --all sends them"
        )
    print(f"evaluations  {done.evaluations} sent")
    print(f"offline      {len(done.offline)} folders of W&B hold nothing more; they are marked as sent")
    print(f"run          {done.url or sink.project}")
    return errors.EXIT_OK


def _of_run(run: Path, args: argparse.Namespace) -> tuple[Any, Any]:
    """The run's configuration, and its W&B sink with what the options change; one of the defaults for a run that has none."""
    from ecdit_train.config import stored

    config = stored.load(run)
    from ecdit_train.observe.wandb_sink import Wandb

    own = next((sink for sink in config.observe.sinks.values() if isinstance(sink, Wandb)), None)
    if own is None and not args.project:
        rule = f"{run} has no W&B sink (observe/sinks=wandb), so say which project: --project NAME"
        raise ConfigError(Problem(field="--project", value=None, rule=rule, nearest="ecdit"))
    own = own or Wandb(
        mode="offline", project="", entity=None, name=None, group=None, tags=(), notes=None, rows="committed"
    )
    return config, replace(own, project=args.project or own.project, entity=args.entity or own.entity)


def _alive(run: Path) -> bool:
    held = lease.read(run)
    return held is not None and held.mark.token is not None and not (held.owner and lease.is_gone(held.owner))

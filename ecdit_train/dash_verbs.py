"""What `ecdit dash` does: bring a run to W&B, and keep the project's dashboards as the package defines them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ecdit_train import errors
from ecdit_train.errors import ConfigError, Problem, RunOwnedError, StorageError
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
    p = verb(
        "apply",
        apply,
        "create or update a project's workspace and report at W&B from the definition in this version of ecdit; applied again it\n"
        "updates the same two and touches nothing else\n\n"
        "  ecdit dash apply runs/xl8e\n"
        "  ecdit dash apply --project ecdit --entity my-team --dry-run",
        parent=group,
    )
    p.add_argument("run", nargs="?", help="a run folder of the project (or --project)")
    p.add_argument("--dry-run", action="store_true", help="print what would be sent, as JSON; no network")
    _place(p)
    verb("show", show, "what the dashboards hold: each section's panels and their metrics", parent=group)


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


def apply(args: argparse.Namespace) -> int:
    project, entity = _project(args)
    from ecdit_train.observe import dashboard, reach

    shown = dashboard.read()
    if not args.dry_run and reach.key() is None:
        rule = "applying needs a login of W&B (wandb login, or WANDB_API_KEY); --dry-run shows what it would send"
        raise ConfigError(Problem(field="WANDB_API_KEY", value=None, rule=rule))
    from ecdit_train.observe import wandb_views

    if args.dry_run:
        print(
            json.dumps(wandb_views.payload(shown, entity=entity or "ENTITY", project=project), indent=1, sort_keys=True)
        )
        return errors.EXIT_OK
    from ecdit_train.observe.redact import redact_text
    from ecdit_train.observe.wandb_run import login_entity

    try:
        done = wandb_views.apply(shown, entity=entity or login_entity(), project=project)
    except Exception as error:
        words = redact_text(" ".join(f"{type(error).__name__}: {error}".split()))
        raise StorageError(f"W&B does not take the dashboards of {project}: {words}") from error
    print(f"{'updated' if done.updated else 'created'}    {sum(len(s.panels) for s in shown.sections)} panels")
    print(f"workspace  {done.workspace}\nreport     {done.report}")
    return errors.EXIT_OK


def show(args: argparse.Namespace) -> int:
    from ecdit_train.observe import dashboard

    shown = dashboard.read()
    print(f"workspace {shown.name!r}, and report {shown.report!r} with the sections marked *")
    for section in shown.sections:
        print(f"\n{'*' if section.opened else ' '} {section.name}")
        for panel in section.panels:
            print(f"    {panel.title:<36}{panel.regex or ', '.join(panel.names or panel.images)}")
    return errors.EXIT_OK


def _project(args: argparse.Namespace) -> tuple[str, str | None]:
    """Project and entity that the options or the run name."""
    if args.run is not None:
        _, sink = _of_run(Path(args.run), args)
        return sink.project, sink.entity
    if not args.project:
        rule = "name a run folder of the project, or the project: ecdit dash apply --project NAME"
        raise ConfigError(Problem(field="--project", value=None, rule=rule, nearest="ecdit"))
    return args.project, args.entity


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

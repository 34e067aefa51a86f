"""What the verbs that draw share: their words, a pipeline with a run's weights, and files that a disk may refuse."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ecdit_train import arguments, errors
from ecdit_train.joining import joined


def drawing_request(kind: type, args: argparse.Namespace) -> tuple[Any, Any]:
    """The verb's own words as `kind`, and the run's configuration with the others applied."""
    return arguments.about_a_run(kind, args.words, sections=arguments.DRAWN_WITH, config_dir=args.config_dir)


@contextmanager
def opened_pipeline(asked: Any, config: Any) -> Iterator[tuple[Any, int, bool]]:
    """What draws with a run's weights, their step, and whether this rank is the one that writes."""
    config = replace(config, parallel=drawing_layout(config.parallel, world=world()))

    from ecdit_train import build

    with joined(config.watch) as (runtime, heart):
        config = agreed(config, runtime)
        heart.enter("idle")  # as long as it takes
        pipeline, step = build.build_pipeline(config, runtime, kind=asked.weights, step=asked.step)
        yield pipeline, step, runtime.rank == 0


def drawing_layout(trained: Any, *, world: int) -> Any:
    """The layout of the training where this world allows it: what 512 ranks trained, one can draw."""
    return replace(
        trained,
        tp=trained.tp if world % trained.tp == 0 else 1,
        ep=trained.ep if world % trained.ep == 0 else 1,
        dp_replicate=1,
        dp_shard=-1,
        replicate_experts=False,
        exchange=trained.exchange if world % trained.ep == 0 else "flat",
    )


def world() -> int:
    """Ranks of this job, as torchrun or `--nproc` tells each of them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def agreed(config: Any, runtime: Any) -> Any:
    """The first rank's configuration, whatever the files of the others say, with the real classes of its slots."""
    from ecdit_train.config.convert import from_dict, to_dict

    return from_dict(runtime.broadcast_object(to_dict(config)))


@contextmanager
def written(path: Path, *, instead: str = "") -> Iterator[None]:
    """A disk that refuses an answer is a StorageError."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise errors.StorageError(f"{path} cannot be written: {error}{instead}") from error


def tell_wandb(config: Any, path: Path) -> None:
    """Send a result where the run's W&B is online and there is a key; else `ecdit dash sync` will."""
    from ecdit_train.config.convert import to_dict
    from ecdit_train.observe import wandb_sync
    from ecdit_train.observe.sinks import SinkContext

    about = SinkContext(folder=Path(config.run), name=config.experiment, config=to_dict(config), resume_step=0)
    if (told := wandb_sync.evaluated(about, config.observe.sinks, path)) is not None:
        print(told)

"""Writes an export: a folder that is complete or not there at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ecdit_train.checkpoint import files
from ecdit_train.config.convert import to_dict
from ecdit_train.config.schema import RunConfig
from ecdit_train.errors import ConfigError, Problem, StorageError

from . import weights
from .weights import Chosen

TRANSFORMER_STEM = "diffusion_pytorch_model"
"""What diffusers calls a model's weights."""


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A temporary sibling that takes the name `out` at the end by one rename; gone again after a failure.

    Raises:
        ConfigError: something of that name is there.
        StorageError: the disk is full, read-only or gone.
    """
    if os.path.lexists(out):
        raise ConfigError(taken(out))
    temporary = out.absolute().with_name(f".{out.name}.tmp-{uuid.uuid4().hex}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for at, _, _ in os.walk(temporary):
            files.sync_folder(Path(at))
        try:
            files.rename_new(temporary, target=out.absolute())
        except FileExistsError:
            raise ConfigError(taken(out)) from None
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise StorageError(f"{out} was not written: {error}") from error
        raise


def taken(out: Path | str) -> Problem:
    return Problem(field="out", value=str(out), rule="exists already; an export makes a new folder")


def write_pipeline(chosen: Chosen, folder: Path, *, config: RunConfig) -> None:
    """`model_index.json`, `transformer/` and `scheduler/` into a folder that exists. Encoders are named, not copied.

    Raises:
        ConfigError: the run's encoders ran before training, and nobody has named them.
    """
    text, image = config.encoders.text, config.encoders.image
    if text.stored or (image.stored and not image.paths()):
        rule = "a pipeline draws with a text encoder and a codec that can decode; name the ones that made the shards"
        nearest = "encoders/text=t5 encoders.text.path=FOLDER encoders.image.path=FOLDER"
        raise ConfigError(Problem(field="encoders", value="stored in the shards", rule=rule, nearest=nearest))
    from .pipeline import ECDiTPipeline
    from .scheduler import ECDiTFlowScheduler
    from .transformer import ECDiTTransformer2DModel

    tree = to_dict(config)
    with torch.device("meta"):
        transformer = ECDiTTransformer2DModel(
            model=tree["model"],
            moe=to_dict(chosen.moe),
            channels=config.encoders.image.channels,
            text_features=config.encoders.text.width,
            prediction=config.diffusion.prediction,
            step=chosen.source.step,
        )
    scheduler = ECDiTFlowScheduler(**tree["sample"])
    pipeline = ECDiTPipeline(
        transformer,
        scheduler,
        encoders=tree["encoders"],
        resolution=config.data.resolution,
        precision=config.train.compute,
    )
    (folder / "transformer").mkdir()
    transformer.save_config(folder / "transformer")
    weights.write(chosen, folder / "transformer", stem=TRANSFORMER_STEM)
    scheduler.save_pretrained(folder / "scheduler")
    pipeline.save_config(folder)

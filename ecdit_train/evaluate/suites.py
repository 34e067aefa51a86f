"""Prompt suites with what is wanted of each picture and who judges: the coloured-shapes set with its exact grader."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipeline.shapes.draw import BACKGROUND, ShapesSpec, shape_sample
from data_pipeline.shapes.grader import grade
from data_pipeline.shapes.make import made_with
from data_pipeline.shapes.prompts import TASKS, Split, all_prompts
from ecdit_train.config.schema import RunConfig
from ecdit_train.errors import ConfigError, Problem

from .allocation import on_patches
from .pictures import SamplePipeline
from .routing_probe import KnownPictures
from .shapes import Grader


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Prompts with what is wanted of them, and who judges."""

    metadata: list[dict[str, Any]]
    others: np.ndarray
    """For each prompt a true picture of some other prompt of its task: uint8 (n, S, S, 3)."""
    grade: Grader


def shapes_suite(*, resolution: int, tasks: Sequence[str] | None, repeat: int, split: Split) -> Suite:
    """Every prompt of the tasks, `repeat` times, with true pictures of `resolution` pixels for the chance line.

    Raises ConfigError for a split in which the tasks have no prompt.
    """
    metadata = [m for m in all_prompts(split=split, tasks=tasks or TASKS) for _ in range(repeat)]
    if not metadata:
        raise ConfigError(
            Problem(
                field="tasks",
                value=",".join(tasks or TASKS),
                nearest="color_attr",
                rule=f"has no prompt in split {split}; only color_attr is held out",
            )
        )
    specs = {task: ShapesSpec(resolution=resolution, mix={task: 1.0}) for task in TASKS}
    others = [shape_sample(i, spec=specs[m["tag"]], seed=0).image for i, m in enumerate(metadata)]
    return Suite(metadata=metadata, others=np.stack(others), grade=lambda image, wanted: grade(image, wanted).correct)


def known_shapes(spec: ShapesSpec, *, count: int, patch_pixels: int, seed: int) -> KnownPictures:
    """`count` pictures of the set that (spec, seed) names. A patch of `patch_pixels` each way shows an object where at least half
    of its pixels are not background. A seed that no training data was made with gives pictures that no model has seen."""
    samples = [shape_sample(i, spec=spec, seed=seed) for i in range(count)]
    images = np.stack([s.image for s in samples])
    painted = (images != np.array(BACKGROUND, np.uint8)).any(-1)
    return KnownPictures(
        images=images,
        captions=tuple(s.caption for s in samples),
        on_object=on_patches(painted, side=spec.resolution // patch_pixels),
    )


PROBED, UNSEEN_SEED = 64, 1
"""Pictures that routing is looked at on, at least, and the seed of their set; training sets have seed 0
unless somebody says another."""


def shapes_for(
    pipeline: SamplePipeline, *, spec: ShapesSpec | None = None, seed: int = UNSEEN_SEED, least: int = PROBED
) -> KnownPictures:
    """`least` or more known pictures of the size and the patches of a run, as many as are whole routing groups. None:
    all six tasks alike."""
    c, together = pipeline.config, images_together(pipeline)
    return known_shapes(
        spec or ShapesSpec(resolution=c.data.resolution),
        count=-(-least // together) * together,
        patch_pixels=c.encoders.image.factor * c.model.patch,
        seed=seed,
    )


def images_together(pipeline: SamplePipeline) -> int:
    """Pictures of a routing group while drawing."""
    c = pipeline.config
    return max(pipeline.group_tokens(c.sample, batch=1) // c.patches_per_image, 1)


@dataclass(frozen=True, kw_only=True)
class ShapesSeen:
    """What a run's coloured shapes look like."""

    spec: ShapesSpec
    seed: int
    """Of the training set; other seeds are other pictures."""
    trained: bool
    """Whether the run's data say so. Otherwise all six tasks alike: the run may know nothing of the kind."""

    @property
    def prompts(self) -> tuple[str, ...]:
        """All that the set can ask for."""
        tasks = [task for task, weight in self.spec.mix.items() if weight > 0]
        return tuple(m["prompt"] for m in all_prompts(split=self.spec.split, tasks=tasks))


def shapes_seen(config: RunConfig) -> ShapesSeen:
    """By the manifest of `data.shards`, if that is there and was made by `ecdit data shapes`."""
    found = made_with(config.data.shards)
    if found is None or found[0].resolution != config.data.resolution:
        return ShapesSeen(spec=ShapesSpec(resolution=config.data.resolution), seed=0, trained=False)
    return ShapesSeen(spec=found[0], seed=found[1], trained=True)

"""Prompt suites with what is wanted of each picture and who judges: the coloured-shapes set with its exact grader."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipeline.shapes.draw import BACKGROUND, ShapesSpec, shape_sample
from data_pipeline.shapes.grader import grade
from data_pipeline.shapes.prompts import TASKS, Split, all_prompts
from ecdit_train.errors import ConfigError, Problem

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
    side = spec.resolution // patch_pixels
    painted = (images != np.array(BACKGROUND, np.uint8)).any(-1)
    share = painted.reshape(count, side, patch_pixels, side, patch_pixels).mean((2, 4))
    return KnownPictures(
        images=images, captions=tuple(s.caption for s in samples), on_object=(share >= 0.5).reshape(count, -1)
    )


PROBED, UNSEEN_SEED = 64, 1
"""Pictures that routing is looked at on, at least, and the seed of their set; training sets have seed 0
unless somebody says another."""


def shapes_for(pipeline: SamplePipeline, *, spec: ShapesSpec | None = None) -> KnownPictures:
    """Known pictures of the size and the patches of a run, as many as are whole routing groups. None: all six tasks alike."""
    c = pipeline.config
    together = max(pipeline.group_tokens(c.sample, batch=1) // c.patches_per_image, 1)
    return known_shapes(
        spec or ShapesSpec(resolution=c.data.resolution),
        count=-(-PROBED // together) * together,
        patch_pixels=c.encoders.image.factor * c.model.patch,
        seed=UNSEEN_SEED,
    )

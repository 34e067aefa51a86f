"""The procedural shapes set: pictures whose captions can be checked exactly, a pure function of (seed, index).

Anti-aliased squares, circles, triangles and crosses on grey (88, 88, 88), at least two pixels apart and one from the
border. Boxes lie on whole pixels, so the grader's template of the same size meets exactly the same coverage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.shapes.prompts import COLORS, TASKS, Prompt, Split, draw_prompt

BACKGROUND = (88, 88, 88)
MIN_RESOLUTION = 16
MIN_SIZE = 5
"""Pixels; the smallest box in which the four shapes differ enough to be told apart."""
GAP, MARGIN = 2, 1
_SUPERSAMPLING = 8
_CANDIDATES = 48
POSITION_THRESHOLD = 0.1
"""GenEval's: an offset counts from a tenth of the summed box sizes on."""


@dataclass(frozen=True, kw_only=True)
class ShapesSpec:
    """What is drawn. `scale` is the range of object sizes as a fraction of the resolution.

    More than one object must fit: their size is capped at half of the side, less the gaps. Weights of `mix` need not
    sum to one; an absent task has weight 0.
    """

    resolution: int = 32
    mix: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(TASKS, 1.0))
    scale: tuple[float, float] = (0.2, 0.35)
    split: Split = "train"

    def __post_init__(self) -> None:
        low, high = self.scale
        if self.resolution < MIN_RESOLUTION:
            raise DataError(f"shapes resolution = {self.resolution}: must be {MIN_RESOLUTION} or more")
        if not 0 < low <= high <= 1:
            raise DataError(f"shapes scale = {self.scale}: must be 0 < low <= high <= 1")
        unknown = sorted(set(self.mix) - set(TASKS))
        if unknown or min(self.mix.values(), default=0) < 0 or sum(self.mix.values()) <= 0:
            raise DataError(f"shapes mix = {dict(self.mix)}: weights of {', '.join(TASKS)}, none negative, not all 0")


@dataclass(frozen=True, slots=True)
class Box:
    """Pixels x0 <= x < x1, y0 <= y < y1; y grows downwards."""

    x0: int
    y0: int
    x1: int
    y1: int


@dataclass(frozen=True, kw_only=True)
class ShapeSample:
    """`image` uint8 (R, R, 3); `metadata` in GenEval's schema; `boxes` in the order the objects were asked for."""

    image: np.ndarray
    caption: str
    metadata: dict[str, Any]
    boxes: tuple[Box, ...]


def shape_sample(index: int, *, spec: ShapesSpec, seed: int) -> ShapeSample:
    """Sample number `index` of the endless set that (spec, seed) names."""
    rng = np.random.Generator(np.random.Philox(key=np.array([seed, index], np.uint64)))
    weights = np.array([spec.mix.get(task, 0.0) for task in TASKS])
    # Last task with weight, should rounding push the draw past the sum.
    pick = min(int(np.searchsorted(np.cumsum(weights / weights.sum()), rng.random(), side="right")), len(TASKS) - 1)
    while weights[pick] == 0:
        pick -= 1
    prompt = draw_prompt(rng, task=TASKS[pick], split=spec.split)
    boxes = place(rng, prompt=prompt, resolution=spec.resolution, scale=spec.scale)
    image = render(prompt, boxes=boxes, resolution=spec.resolution)
    return ShapeSample(image=image, caption=prompt.metadata["prompt"], metadata=prompt.metadata, boxes=boxes)


def place(rng: np.random.Generator, *, prompt: Prompt, resolution: int, scale: tuple[float, float]) -> tuple[Box, ...]:
    """Boxes for the objects of a prompt: apart from each other, inside the canvas, in the relation it names."""
    num = len(prompt.things)
    cap = resolution - 2 * MARGIN if num == 1 else resolution // 2 - GAP
    high = max(MIN_SIZE, min(cap, round(scale[1] * resolution)))
    low = min(high, max(MIN_SIZE, round(scale[0] * resolution)))
    size_K = rng.integers(low, high + 1, num)
    anywhere = MARGIN + rng.random((_CANDIDATES, num, 2)) * (resolution - 2 * MARGIN - size_K + 1)[:, None]
    # Crowded canvases: one object per quadrant always fits, first with jitter, at last without.
    half = resolution // 2
    cells = np.array([(0, 0), (1, 0), (0, 1), (1, 1)])[rng.permuted(np.tile(np.arange(4), (_CANDIDATES, 1)), axis=1)]
    jitter = rng.random((_CANDIDATES, num, 2))
    jitter[-_CANDIDATES // 2 :] = 0.0
    quadrants = cells[:, :num] * half + MARGIN + jitter * (half - 2 * MARGIN - size_K + 1)[:, None]
    corner_TK2 = np.floor(np.concatenate([anywhere, quadrants])).astype(int)
    good = _apart(corner_TK2, size_K)
    for number, wanted in enumerate(prompt.metadata["include"]):
        if "position" in wanted:
            relation, target = wanted["position"]
            good &= _related(corner_TK2, size_K, located=number, target=target, relation=relation)
    assert good.any(), (prompt.metadata, resolution, size_K)
    corner_K2 = corner_TK2[int(np.argmax(good))]
    return tuple(
        Box(int(x), int(y), int(x + size), int(y + size)) for (x, y), size in zip(corner_K2, size_K, strict=True)
    )


def render(prompt: Prompt, *, boxes: tuple[Box, ...], resolution: int) -> np.ndarray:
    """uint8 (R, R, 3): every object blended onto the background by its coverage."""
    image = np.full((resolution, resolution, 3), BACKGROUND, np.float32)
    for thing, box in zip(prompt.things, boxes, strict=True):
        alpha = coverage(thing.shape, height=box.y1 - box.y0, width=box.x1 - box.x0)[..., None]
        patch = image[box.y0 : box.y1, box.x0 : box.x1]
        patch += alpha * (np.array(COLORS[thing.color], np.float32) - patch)
    return np.rint(image).astype(np.uint8)


@lru_cache(maxsize=4096)
def coverage(shape: str, *, height: int, width: int) -> np.ndarray:
    """float32 (height, width): the share of every pixel that the shape covers when it fills the box."""
    fine = _SUPERSAMPLING
    v = ((np.arange(height * fine) + 0.5) / (height * fine))[:, None]
    u = ((np.arange(width * fine) + 0.5) / (width * fine))[None, :]
    if shape == "square":
        inside = np.ones((height * fine, width * fine), bool)
    elif shape == "circle":
        inside = (u - 0.5) ** 2 + (v - 0.5) ** 2 <= 0.25
    elif shape == "triangle":
        inside = np.abs(u - 0.5) <= v / 2
    else:
        inside = (np.abs(u - 0.5) <= 1 / 6) | (np.abs(v - 0.5) <= 1 / 6)
    mean = inside.reshape(height, fine, width, fine).mean(axis=(1, 3)).astype(np.float32)
    mean.setflags(write=False)  # shared by every caller
    return mean


def relations(offset: np.ndarray, *, summed_size: np.ndarray, least: float = 0.5) -> dict[str, np.ndarray]:
    """GenEval's rule: which relations hold for centre offsets (located - target).

    The offset shrinks by a tenth of the summed box sizes per axis; a direction holds when its share of the offset's
    length is above `least`. Two directions may hold.

    Args:
        offset, summed_size: (..., 2), x then y, in pixels.

    Returns:
        bool (...) per relation.
    """
    shrunk = np.sign(offset) * np.maximum(np.abs(offset) - POSITION_THRESHOLD * summed_size, 0)
    share = shrunk / np.maximum(np.linalg.norm(offset, axis=-1, keepdims=True), 1e-6)
    x, y = share[..., 0], share[..., 1]
    return {"left of": x < -least, "right of": x > least, "above": y < -least, "below": y > least}


def _apart(corner_TK2: np.ndarray, size_K: np.ndarray) -> np.ndarray:
    good = np.ones(len(corner_TK2), bool)
    for a in range(len(size_K)):
        for b in range(a):
            distance = corner_TK2[:, a] - corner_TK2[:, b]
            good &= ((distance >= size_K[b] + GAP) | (-distance >= size_K[a] + GAP)).any(axis=-1)
    return good


def _related(corner_TK2: np.ndarray, size_K: np.ndarray, *, located: int, target: int, relation: str) -> np.ndarray:
    centre = corner_TK2 + size_K[:, None] / 2
    summed = np.full(2, size_K[located] + size_K[target])
    # A little more than the grader asks for: a pixel lost at an anti-aliased edge may not turn truth into error.
    return relations(centre[:, located] - centre[:, target], summed_size=summed, least=0.6)[relation]

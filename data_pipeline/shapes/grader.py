"""The exact grader of the shapes set: what is in a picture, and does it satisfy a GenEval prompt?

Foreground is what lies further than 55 from the background colour; objects are its 4-connected components. Coverage
is soft: how far a pixel has gone from the background to the object's colour. It is compared with the template of
each shape at the object's own box (with a hard mask only 93 % of true 32 x 32 pictures pass). Colour is the palette
colour of the majority of its pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import ndimage

from data_pipeline.shapes.draw import BACKGROUND, MIN_SIZE, Box, coverage, relations
from data_pipeline.shapes.prompts import COLORS, SHAPES

FOREGROUND_DISTANCE = 55.0
PALETTE_DISTANCE = 70.0
LEAST_IOU = 0.65
MAX_COMPONENTS = 64
"""More components than this are noise, not objects; not looking at them keeps grading fast on early samples."""
_MIN_PIXELS = 7
_FAINT = 0.08
"""Coverage from which a row beside the component still belongs to it: an apex covers a quarter of two pixels."""

_PALETTE = np.array(list(COLORS.values()), np.float32)
_NAMES = tuple(COLORS)
_BACKGROUND = np.array(BACKGROUND, np.float32)


@dataclass(frozen=True, kw_only=True)
class DetectedObject:
    """One object; `score` is the soft intersection over union with its shape's template, 0 to 1."""

    shape: str
    color: str
    box: Box
    score: float


@dataclass(frozen=True, kw_only=True)
class Grade:
    """`reason` is empty when correct, else what was expected and what was found."""

    correct: bool
    reason: str
    objects: tuple[DetectedObject, ...]


def foreground(image: np.ndarray) -> np.ndarray:
    """uint8 (..., H, W, 3) -> bool (..., H, W): what is not background."""
    return ((image.astype(np.float32) - _BACKGROUND) ** 2).sum(-1) > FOREGROUND_DISTANCE**2


def detect(image: np.ndarray) -> tuple[DetectedObject, ...]:
    """Objects of a picture, best first.

    Args:
        image: uint8 (H, W, 3).
    """
    pixels = image.astype(np.float32)
    labels, num = ndimage.label(foreground(image))
    if num > MAX_COMPONENTS:
        return ()
    found = []
    for number, window in enumerate(ndimage.find_objects(labels), start=1):
        thing = _classify(pixels, labels == number, window)
        if thing is not None:
            found.append(thing)
    return tuple(sorted(found, key=lambda thing: -thing.score))


def grade(image: np.ndarray, metadata: Mapping[str, Any], *, strict: bool = False) -> Grade:
    """GenEval's rule: every `include` must hold, no `exclude` may. `strict` also forbids objects nobody asked for.

    Args:
        image: uint8 (H, W, 3).
        metadata: GenEval's schema, see `prompts`.
    """
    objects = detect(image)
    reasons: list[str] = []
    matched: list[list[DetectedObject]] = []
    for wanted in metadata["include"]:
        shape, count, color = wanted["class"], wanted["count"], wanted.get("color")
        candidates = [thing for thing in objects if thing.shape == shape and color in (None, thing.color)]
        if len(candidates) < count:
            name = f"{color} {shape}" if color else shape
            reasons.append(f"expected {name} >= {count}, found {len(candidates)}")
            matched.append([])
            continue
        chosen = candidates[:count]
        matched.append(chosen)
        if "position" in wanted:
            relation, target = wanted["position"]
            if not matched[target]:
                reasons.append(f"no target for {shape} {relation}")
            elif not all(_holds(thing, other, relation) for thing in chosen for other in matched[target]):
                reasons.append(f"expected {shape} {relation} target")
    for unwanted in metadata.get("exclude", ()):
        num = sum(thing.shape == unwanted["class"] for thing in objects)
        if num >= unwanted["count"]:
            reasons.append(f"expected {unwanted['class']} < {unwanted['count']}, found {num}")
    if strict and len(objects) > sum(wanted["count"] for wanted in metadata["include"]):
        reasons.append(f"{len(objects)} objects, more than asked for")
    return Grade(correct=not reasons, reason="; ".join(reasons), objects=objects)


def single_object(image: np.ndarray) -> tuple[str, str] | None:
    """(shape, colour) when the picture shows exactly one object, else None."""
    objects = detect(image)
    return (objects[0].shape, objects[0].color) if len(objects) == 1 else None


def _classify(pixels: np.ndarray, mask: np.ndarray, window: tuple[slice, slice]) -> DetectedObject | None:
    members = pixels[window][mask[window]]
    if len(members) < _MIN_PIXELS:
        return None
    distance = np.linalg.norm(members[:, None] - _PALETTE, axis=-1)
    nearest = distance.argmin(-1)[distance.min(-1) <= PALETTE_DISTANCE]
    votes = np.bincount(nearest, minlength=len(_NAMES))
    color = int(votes.argmax())
    # A third: at five pixels, half of a triangle's pixels are blends of its colour and the background.
    if votes[color] * 3 < len(members):
        return None

    rows, columns = window
    top, left = max(0, rows.start - 1), max(0, columns.start - 1)
    around = pixels[top : rows.stop + 1, left : columns.stop + 1]
    direction = _PALETTE[color] - _BACKGROUND
    alpha = np.clip((around - _BACKGROUND) @ direction / (direction @ direction), 0, 1)
    tight = Box(columns.start - left, rows.start - top, columns.stop - left, rows.stop - top)
    least = MIN_SIZE - 1  # a pixel of an anti-aliased edge may be lost
    boxes = [box for box in (_extent(alpha), tight) if min(box.x1 - box.x0, box.y1 - box.y0) >= least]
    if not boxes:
        return None
    score, shape, box = max(
        ((_soft_iou(alpha, box, shape), shape, box) for box in boxes for shape in SHAPES), key=lambda match: match[0]
    )
    if score < LEAST_IOU:
        return None
    placed = Box(box.x0 + left, box.y0 + top, box.x1 + left, box.y1 + top)
    return DetectedObject(shape=shape, color=_NAMES[color], box=placed, score=score)


def _extent(alpha: np.ndarray) -> Box:
    """Box of everything that is faintly covered: rows that the foreground threshold lost come back."""
    rows, columns = np.flatnonzero((alpha > _FAINT).any(1)), np.flatnonzero((alpha > _FAINT).any(0))
    return Box(int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)


def _soft_iou(alpha: np.ndarray, box: Box, shape: str) -> float:
    """Sum of minima over sum of maxima of coverage and template, pixels around the box counting as empty template."""
    template = coverage(shape, height=box.y1 - box.y0, width=box.x1 - box.x0)
    inside = alpha[box.y0 : box.y1, box.x0 : box.x1]
    shared = float(np.minimum(inside, template).sum())
    return shared / max(float(alpha.sum()) + float(template.sum()) - shared, 1e-6)


def _holds(located: DetectedObject, target: DetectedObject, relation: str) -> bool:
    a, b = located.box, target.box
    offset = np.array([a.x0 + a.x1 - b.x0 - b.x1, a.y0 + a.y1 - b.y0 - b.y1]) / 2
    summed = np.array([a.x1 - a.x0 + b.x1 - b.x0, a.y1 - a.y0 + b.y1 - b.y0])
    return bool(relations(offset, summed_size=summed)[relation])

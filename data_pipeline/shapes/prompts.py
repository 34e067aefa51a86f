"""What the shapes set says: the six GenEval tasks over four shapes and eight colours, in GenEval's metadata schema.

`{"tag", "include": [{"class", "count", "color"?, "position"?: [relation, index]}], "exclude"?, "prompt"}`; a reader
or writer for real GenEval takes it unchanged. Counting and position prompts come in a plain form, as in GenEval, and
in a coloured one ("a photo of three blue squares"), drawn equally often.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations, product
from typing import Any, Literal

import numpy as np

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
SHAPES = ("square", "circle", "triangle", "cross")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (225, 35, 35),
    "green": (35, 170, 50),
    "blue": (40, 70, 230),
    "yellow": (245, 225, 45),
    "purple": (175, 45, 215),
    "cyan": (45, 215, 225),
    "white": (245, 245, 245),
    "black": (10, 10, 10),
}
"""RGB. Near the corners of the colour cube: every pair is more than 100 apart, and the background more than 120."""
RELATIONS = ("left of", "right of", "above", "below")
COUNTS = {2: "two", 3: "three", 4: "four"}
Split = Literal["train", "heldout", "all"]


@dataclass(frozen=True, slots=True)
class Thing:
    """One object to draw."""

    shape: str
    color: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """Metadata and the objects to draw for it, in the order of `include` (repeated `count` times)."""

    metadata: dict[str, Any]
    things: tuple[Thing, ...]


def held_out(prompt: str) -> bool:
    """An eighth of the color_attr prompts is never trained on: the column for compositional generalisation."""
    return zlib.crc32(prompt.encode()) % 8 == 0


def single_object(shape: str) -> dict[str, Any]:
    return _metadata("single_object", f"a photo of {_a(shape)}", [_one(shape)])


def two_object(first: str, second: str) -> dict[str, Any]:
    return _metadata("two_object", f"a photo of {_a(first)} and {_a(second)}", [_one(first), _one(second)])


def counting(shape: str, *, count: int, color: str | None = None) -> dict[str, Any]:
    name = f"{color} {shape}" if color else shape
    plural = f"{name}es" if name.endswith("s") else f"{name}s"
    exclude = [{"class": shape, "count": count + 1}]
    include = [_one(shape, color=color) | {"count": count}]
    return _metadata("counting", f"a photo of {COUNTS[count]} {plural}", include) | {"exclude": exclude}


def colors(thing: Thing) -> dict[str, Any]:
    return _metadata("colors", f"a photo of {_phrase(thing)}", [_one(thing.shape, color=thing.color)])


def position(located: str, relation: str, target: str, *, tints: tuple[str, str] | None = None) -> dict[str, Any]:
    """`located` is `relation` of `target`; `tints` are the colours of the two. The target comes first in `include`."""
    tint, target_tint = tints or (None, None)
    what = _a(f"{tint} {located}" if tint else located), _a(f"{target_tint} {target}" if target_tint else target)
    include = [_one(target, color=target_tint), _one(located, color=tint) | {"position": [relation, 0]}]
    return _metadata("position", f"a photo of {what[0]} {relation} {what[1]}", include)


def color_attr(first: Thing, second: Thing) -> dict[str, Any]:
    include = [_one(thing.shape, color=thing.color) for thing in (first, second)]
    return _metadata("color_attr", f"a photo of {_phrase(first)} and {_phrase(second)}", include)


def all_prompts(*, split: Split = "all", tasks: Sequence[str] = TASKS) -> list[dict[str, Any]]:
    """Every plain prompt of the tasks in a fixed order: 4 + 12 + 12 + 32 + 48 + 672 = 780 for "all".

    "heldout" is the withheld part of color_attr alone, "train" is all the rest.
    """
    every: list[dict[str, Any]] = [single_object(shape) for shape in SHAPES]
    every += [two_object(a, b) for a, b in permutations(SHAPES, 2)]
    every += [counting(shape, count=count) for shape, count in product(SHAPES, COUNTS)]
    every += [colors(Thing(shape, color)) for shape, color in product(SHAPES, COLORS)]
    every += [position(a, relation, b) for (a, b), relation in product(permutations(SHAPES, 2), RELATIONS)]
    every += [
        color_attr(Thing(a, x), Thing(b, y))
        for (a, b), (x, y) in product(permutations(SHAPES, 2), permutations(COLORS, 2))
    ]
    return [m for m in every if m["tag"] in tasks and _in_split(m["prompt"], m["tag"], split)]


def draw_prompt(rng: np.random.Generator, *, task: str, split: Split = "train") -> Prompt:
    """A random prompt of a task. "heldout" concerns color_attr; for the other tasks it equals "train"."""
    a, b = (SHAPES[i] for i in rng.permutation(len(SHAPES))[:2])
    x, y = (list(COLORS)[i] for i in rng.permutation(len(COLORS))[:2])
    first, second = Thing(a, x), Thing(b, y)
    if task == "single_object":
        return Prompt(single_object(a), (first,))
    if task == "two_object":
        return Prompt(two_object(a, b), (first, second))
    if task == "colors":
        return Prompt(colors(first), (first,))
    if task == "counting":
        count = int(rng.integers(2, 5))
        color = x if rng.random() < 0.5 else None
        return Prompt(counting(a, count=count, color=color), (first,) * count)
    # Coloured position prompts keep to the same rule, or the withheld pairs would be described after all.
    rule: Split = split if task == "color_attr" or split != "heldout" else "train"
    while not _in_split(color_attr(first, second)["prompt"], "color_attr", rule):
        x, y = (list(COLORS)[i] for i in rng.permutation(len(COLORS))[:2])
        first, second = Thing(a, x), Thing(b, y)
    if task == "color_attr":
        return Prompt(color_attr(first, second), (first, second))
    relation = RELATIONS[int(rng.integers(len(RELATIONS)))]
    tints = (x, y) if rng.random() < 0.5 else None
    return Prompt(position(a, relation, b, tints=tints), (second, first))


def _in_split(prompt: str, task: str, split: Split) -> bool:
    withheld = task == "color_attr" and held_out(prompt)
    return split == "all" or withheld == (split == "heldout")


def _metadata(tag: str, prompt: str, include: list[dict[str, Any]]) -> dict[str, Any]:
    return {"tag": tag, "include": include, "prompt": prompt}


def _one(shape: str, *, color: str | None = None) -> dict[str, Any]:
    return {"class": shape, "count": 1} | ({"color": color} if color else {})


def _phrase(thing: Thing) -> str:
    return _a(f"{thing.color} {thing.shape}")


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"

"""KEY=VALUE words of the verbs that draw, grade and make data: readers of single values, and every mistake at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ecdit_train.errors import ConfigError, Problem

SAMPLING = frozenset({"sampler", "steps", "guidance", "scope", "group_size", "seed"})
"""Keys of the configuration's sample section that drawing verbs take; their values are read with the configuration's own rules."""


def read(
    words: Sequence[str], *, own: Mapping[str, Callable[[str], Any]], required: Sequence[str], sampling: bool = False
) -> dict[str, Any]:
    """KEY=VALUE words of a verb, each value through its reader; every mistake at once."""
    import difflib

    readers = dict(own) | (dict.fromkeys(SAMPLING, str) if sampling else {})
    problems: list[Problem] = []
    out: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in readers:
            near = difflib.get_close_matches(key, sorted(readers), n=1, cutoff=0.0)
            problems.append(Problem(field=key, value=value, rule="is not a key of this verb", nearest=f"{near[0]}=..."))
            continue
        try:
            out[key] = readers[key](value)
        except (ValueError, OSError) as e:
            problems.append(Problem(field=key, value=value, rule=str(e)))
            out[key] = None
    problems += [
        Problem(field=key, value=None, rule="is required", nearest=f"{key}=...") for key in required if key not in out
    ]
    if problems:
        raise ConfigError(problems)
    return out


def whole(low: int) -> Callable[[str], int]:
    def reader(text: str) -> int:
        if not text.isdecimal() or int(text) < low:
            raise ValueError(f"must be a whole number, {low} or more")
        return int(text)

    return reader


def one_of(*choices: str) -> Callable[[str], str]:
    def reader(text: str) -> str:
        if text not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}")
        return text

    return reader


def tasks(text: str) -> list[str]:
    from data_pipeline.shapes_prompts import TASKS

    if not set(text.split(",")) <= set(TASKS):
        raise ValueError(f"must be some of {', '.join(TASKS)}, joined by commas")
    return text.split(",")


def prompts(text: str) -> list[str]:
    """`A|B|...`, or one a line in @FILE."""
    lines = (
        Path(text[1:]).read_text(encoding="utf-8").splitlines() if text.startswith("@") else text.strip("[]").split("|")
    )
    wanted = [line.strip() for line in lines if line.strip()]
    if not wanted:
        raise ValueError("needs at least one prompt, as in 'a photo of a red circle'")
    return wanted


def mix(text: str) -> dict[str, float]:
    try:
        return {task: float(weight) for task, weight in (word.split(":") for word in text.split(","))}
    except ValueError:
        raise ValueError("must be task:weight,task:weight,...") from None


def interval(text: str) -> tuple[float, float]:
    try:
        low, high = (float(x) for x in text.split(","))
    except ValueError:
        raise ValueError("must be two numbers, LOW,HIGH") from None
    return low, high


DRAWING: dict[str, Callable[[str], Any]] = {
    "run": str,
    "repeat": whole(1),
    "weights": one_of("ema", "raw"),
    "step": whole(0),
    "text_encoder": str,
    "image_codec": str,
}
"""What every drawing verb takes."""

"""Words that a model cannot know, told before they are drawn in silence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ecdit_train.config.nearest import closest
from ecdit_train.diffusion.encoders import KnowsWords, TextEncoder

TOLD = 5
"""Words whose nearest one is looked for."""


@dataclass(frozen=True, kw_only=True)
class Unknown:
    """A word of a prompt that no training caption had."""

    word: str
    nearest: str | None

    def __str__(self) -> str:
        near = f" (nearest: {self.nearest})" if self.nearest is not None else ""
        return f"{self.word!r}{near}"


def unknown_words(prompts: Sequence[str], *, text: TextEncoder, seen: Sequence[str] | None) -> list[Unknown]:
    """In the order of the prompts, each once. Nothing for an encoder that knows words by itself, or where what was
    seen is not known."""
    if seen is None or not isinstance(text, KnowsWords):
        return []
    known = set(seen)
    words = dict.fromkeys(word for prompt in prompts for word in text.words(prompt))
    strange = [word for word in words if word not in known]
    return [Unknown(word=word, nearest=_nearest(word, seen) if n < TOLD else None) for n, word in enumerate(strange)]


def _nearest(word: str, seen: Sequence[str]) -> str | None:
    """Among words of about its length: the comparison costs a tenth of a millisecond for each."""
    return closest(word, [other for other in seen if abs(len(other) - len(word)) <= 2 and other[:1] == word[:1]])


def told(unknown: Sequence[Unknown]) -> str:
    """One line for people."""
    plural = "these words" if len(unknown) > 1 else "this word"
    return f"no training caption had {plural}, so nothing is known of what to draw: {', '.join(map(str, unknown))}"

"""What the user probably meant: nearest keys, choices and numbers. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher

ALIASES = {
    "batch_size": "train.global_batch",
    "global_batch_size": "train.global_batch",
    "micro_batch_size": "train.microbatch",
    "learning_rate": "optim.lr",
    "max_steps": "train.steps",
    "num_steps": "train.steps",
    "hidden_size": "model.width",
    "hidden_dim": "model.width",
    "depth": "model.layers",
    "num_layers": "model.layers",
    "num_heads": "model.heads",
    "experts": "moe.num_experts",
    "gradient_clip": "optim.clip_norm",
    "grad_clip": "optim.clip_norm",
    "image_size": "data.resolution",
    "cfg_scale": "sample.guidance",
}
"""Names that other trainers use."""


def similarity(a: str, b: str) -> float:
    """0 (nothing in common) to 1 (equal); symmetric, unlike SequenceMatcher."""
    a, b = a.lower(), b.lower()
    return max(SequenceMatcher(None, a, b).ratio(), SequenceMatcher(None, b, a).ratio())


def closest(word: str, choices: Iterable[object], *, cutoff: float = 0.5) -> str | None:
    """The most similar choice, or None if nothing is similar; the first wins a tie."""
    scored = [(similarity(word, str(choice)), str(choice)) for choice in choices]
    best = max(scored, key=lambda pair: pair[0], default=None)
    return best[1] if best is not None and best[0] >= cutoff else None


def closest_key(key: str, keys: Sequence[str], *, cutoff: float = 0.65) -> str | None:
    """The most similar dotted key: by its last part and its section, or by its last part alone where that is exact."""
    head, _, last = key.rpartition(".")
    if (alias := ALIASES.get(last.lower())) in keys:
        return alias

    def score(candidate: str) -> float:
        candidate_head, _, candidate_last = candidate.rpartition(".")
        tail = similarity(last, candidate_last)
        # Where no section was typed, none is wrong, and a key or group that needs none is the likelier.
        section = similarity(head, candidate_head) if head else 0.5 if candidate_head else 1.0
        exact = 0.85 + 0.1 * section if last == candidate_last else 0.0  # the right name in the wrong section
        return max(0.7 * tail + 0.3 * section, exact)

    # Of equally similar ones that with the same letters: two of them changed places.
    scored = [(score(candidate), sorted(candidate) == sorted(key), candidate) for candidate in keys]
    best = max(scored, key=lambda found: found[:2], default=None)
    return best[2] if best is not None and best[0] >= cutoff else None


def divisors(number: int) -> list[int]:
    """All divisors of a positive whole number, ascending."""
    return [d for d in range(1, abs(number) + 1) if number % d == 0] if number else [1]


def nearest_divisor(value: int, of: int) -> int:
    """The divisor of `of` nearest to `value`; the smaller one on a tie."""
    return min(divisors(of), key=lambda d: (abs(d - value), d))


def nearest_multiple(value: int, of: int, *, least: int | None = None) -> int:
    """The multiple of `of` nearest to `value`, at least `least` (default: `of`); the smaller one on a tie."""
    least = of if least is None else least
    below = value // of * of
    candidates = [m for m in (below, below + of) if m >= least]
    return min(candidates, key=lambda m: (abs(m - value), m)) if candidates else -(-least // of) * of

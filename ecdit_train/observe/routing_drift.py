"""Whether routing has settled: the same images, noise and timesteps at two steps of a run, and how many choices moved.

Legend: N tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ecdit_train.model.assignment import Assignment, chosen

from .metrics import Sums

Selections = Sequence[Sequence[Tensor]]
"""By microbatch and sparse layer: (N, E) bools, who works on what."""


def selections(assignments: Sequence[Assignment]) -> list[Tensor]:
    """Of one microbatch."""
    return [chosen(assignment) > 0 for assignment in assignments]


def drift_sums(before: Selections, now: Selections, *, layers: Sequence[int]) -> dict[str, Tensor]:
    """By layer: choices of one time alone, and choices of both times together; to be added up over ranks."""
    sums = {}
    for place, number in enumerate(layers):
        pairs = [(a[place], b[place]) for a, b in zip(before, now, strict=True)]
        moved = torch.stack([(a ^ b).sum() for a, b in pairs]).sum()
        made = torch.stack([a.sum() + b.sum() for a, b in pairs]).sum()
        sums[f"drift/{number}"] = torch.stack([moved, made])
    return sums


def drift_record(sums: Sums, *, layers: Sequence[int]) -> dict[str, float]:
    """`L{n}/selection_drift` of each layer and `selection_drift` over layers, 0 to 1; empty without two times to compare."""
    moved = {n: sums[f"drift/{n}"] for n in layers if f"drift/{n}" in sums}
    if not moved:
        return {}
    record = {f"L{n}/selection_drift": float(one / max(made, 1)) for n, (one, made) in moved.items()}
    return record | {"selection_drift": sum(record.values()) / len(record)}

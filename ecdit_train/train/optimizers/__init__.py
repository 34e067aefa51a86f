"""Optimizers, one file each with its configuration.

Legend of their docstrings: p parameter, g gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn


def matrices_and_vectors(params: Mapping[str, nn.Parameter], *, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: decay is for what has two dims or more and spares vectors (norms, biases)."""
    groups = (
        ([p for p in params.values() if p.dim() > 1], weight_decay),
        ([p for p in params.values() if p.dim() <= 1], 0.0),
    )
    return [{"params": group, "weight_decay": decay} for group, decay in groups if group]


def make_state(optimizer: torch.optim.Optimizer, params: Iterable[nn.Parameter], *, names: Iterable[str]) -> None:
    """State now and not at the first step: its memory shows up at the start, and a checkpoint can be loaded into it."""
    names = list(names)
    for p in params:
        optimizer.state[p] = {"step": torch.tensor(0.0), **{name: torch.zeros_like(p) for name in names}}

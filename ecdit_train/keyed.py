"""Randomness as a pure function: every draw is a value of (seed, purpose, position, index), never
of a generator's past.

Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in torch integer arithmetic, so
the same words come out on CPU and GPU (logarithm and cosine may differ in the last bit), on one rank or 512, before and
after a resume. A position is the global position of a sample in the training stream (or a parameter's name when weights
are initialised); an index counts values inside it.

The words and their values are made in `ecdit_train.kernels.draws`, by a kernel on CUDA.

Legend: B positions, N values per position.
"""

from __future__ import annotations

import math
import zlib
from enum import IntEnum

import torch
from torch import Tensor

from ecdit_train.kernels import draws
from ecdit_train.kernels.draws import MASK, philox

__all__ = ["Purpose", "normal", "philox", "subset", "uniform", "uniform_box"]

_CHUNK = 1 << 22
"""Values made at once when weights are initialised; bounds the memory of the integer words."""


class Purpose(IntEnum):
    """What a draw is for; part of the key, so that draws for different purposes are independent."""

    NOISE = 1
    TIMESTEP = 2
    PATCH_MASK = 3
    CAPTION_DROP = 4
    SAMPLE_NOISE = 5
    INIT = 6


def _key(seed: int, purpose: Purpose) -> tuple[int, int]:
    return seed & MASK, ((seed >> 32) ^ (int(purpose) * 0x9E3779B9)) & MASK


def uniform(seed: int, purpose: Purpose, position_B: Tensor, *, num: int) -> Tensor:
    """`num` uniform values in (0, 1) for each position: (B, num) float32."""
    return draws.uniform(_key(seed, purpose), position_B, num=num)


def normal(seed: int, purpose: Purpose, position_B: Tensor, *, shape: tuple[int, ...]) -> Tensor:
    """Standard normal values of `shape` for each position, by Box-Muller: (B, *shape) float32."""
    return draws.normal(_key(seed, purpose), position_B, num=math.prod(shape)).reshape(-1, *shape)


def subset(seed: int, purpose: Purpose, position_B: Tensor, *, total: int, keep: int) -> Tensor:
    """`keep` of `total` indices for each position, uniform without replacement, ascending: (B, keep) int64."""
    order = uniform(seed, purpose, position_B, num=total).argsort(dim=1, stable=True)
    return order[:, :keep].sort(dim=1).values


def uniform_box(
    seed: int,
    name: str,
    *,
    global_shape: tuple[int, ...],
    offsets: tuple[int, ...],
    sizes: tuple[int, ...],
    device: torch.device | str = "cpu",
) -> Tensor:
    """The values in (0, 1) of one box of a named tensor, without making the rest of it: `sizes` float32.

    Element `(i, j, ...)` depends on the seed, the name and its global linear index only, so every layout of a model
    starts from the same weights. Runs of the last dims are made in one piece.
    """
    if math.prod(sizes) == 0:
        return torch.empty(sizes, device=device)
    # Fold trailing dims into one contiguous run: up to the first that the box cuts, and no longer than a chunk of work.
    lead, run, inner, start = len(global_shape), 1, 1, 0
    while lead > 0 and (run == 1 or run * sizes[lead - 1] <= _CHUNK):
        lead -= 1
        run, start, inner = run * sizes[lead], start + inner * offsets[lead], inner * global_shape[lead]
        if sizes[lead] != global_shape[lead]:
            break
    rows = torch.zeros(1, dtype=torch.int64, device=device)
    for dim in range(lead):
        step = torch.arange(offsets[dim], offsets[dim] + sizes[dim], device=device)
        rows = (rows[:, None] * global_shape[dim] + step).flatten()
    position = torch.tensor([zlib.crc32(name.encode())], device=device)
    first = rows * inner + start
    out = torch.empty((len(rows), run), device=device)
    rows_per_chunk = max(1, _CHUNK // run)
    for i in range(0, len(rows), rows_per_chunk):
        part = first[i : i + rows_per_chunk]
        # A run starts at any word of a Philox block.
        out[i : i + len(part)] = draws.uniform(
            _key(seed, Purpose.INIT), position.expand(len(part)), num=run, first_B=part
        )
    return out.view(sizes)

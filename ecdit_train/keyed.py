"""Randomness as a pure function: every draw is a value of (seed, purpose, position, index), never
of a generator's past.

Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in torch integer arithmetic, so
the same words come out on CPU and GPU (logarithm and cosine may differ in the last bit), on one rank or 512, before and
after a resume. A position is the global position of a sample in the training stream (or a parameter's name when weights
are initialised); an index counts values inside it.

Legend: B positions, N values per position, W = 4 words of 32 bits per Philox block.
"""

from __future__ import annotations

import math
import zlib
from enum import IntEnum

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
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


def philox(
    counter: tuple[Tensor | int, Tensor | int, Tensor | int, Tensor | int], key: tuple[int, int]
) -> list[Tensor]:
    """Four 32-bit words per counter, as int64 tensors in [0, 2^32); counters are broadcast against each other.

    Products of two 32-bit words wrap in int64, but their low 64 bits are exact, so shift and mask give both halves.
    """
    c0, c1, c2, c3 = (c if isinstance(c, Tensor) else torch.tensor(c) for c in counter)
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return [c0, c1, c2, c3]


def _words(seed: int, purpose: Purpose, position_B: Tensor, blocks_N: Tensor) -> list[Tensor]:
    """Four words for every (position, block): each of shape (B, len(blocks))."""
    position = position_B.to(torch.int64)[:, None]
    block = blocks_N.to(torch.int64)[None, :]
    key = (seed & _MASK, ((seed >> 32) ^ (int(purpose) * _W0)) & _MASK)
    return philox((block & _MASK, block >> 32, position & _MASK, (position >> 32) & _MASK), key)


def _unit(word: Tensor) -> Tensor:
    """Uniform in the open interval (0, 1), float32: the upper 23 bits, centred in their cell (with 24, the centres
    round and the last one is 1)."""
    return ((word >> 9).to(torch.float32) + 0.5) * 2.0**-23


def uniform(seed: int, purpose: Purpose, position_B: Tensor, *, num: int) -> Tensor:
    """`num` uniform values in (0, 1) for each position: (B, num) float32."""
    blocks = torch.arange((num + 3) // 4, device=position_B.device)
    words = torch.stack([_unit(w) for w in _words(seed, purpose, position_B, blocks)], dim=-1)
    return words.flatten(1)[:, :num]


def normal(seed: int, purpose: Purpose, position_B: Tensor, *, shape: tuple[int, ...]) -> Tensor:
    """Standard normal values of `shape` for each position, by Box-Muller: (B, *shape) float32."""
    num = math.prod(shape)
    blocks = torch.arange((num + 3) // 4, device=position_B.device)
    a, b, c, d = (_unit(w) for w in _words(seed, purpose, position_B, blocks))
    ra, rc = torch.sqrt(-2.0 * torch.log(a)), torch.sqrt(-2.0 * torch.log(c))
    b, d = 2.0 * math.pi * b, 2.0 * math.pi * d
    values = torch.stack([ra * torch.cos(b), ra * torch.sin(b), rc * torch.cos(d), rc * torch.sin(d)], dim=-1)
    return values.flatten(1)[:, :num].reshape(-1, *shape)


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
    # Each run starts at any word of a block: make whole blocks and cut.
    num_blocks = (run + 3) // 4 + 1
    out = torch.empty((len(rows), run), device=device)
    rows_per_chunk = max(1, _CHUNK // run)
    for i in range(0, len(rows), rows_per_chunk):
        part = first[i : i + rows_per_chunk]
        blocks = ((part // 4)[:, None] + torch.arange(num_blocks, device=device)).flatten()
        words = _words(seed, Purpose.INIT, position, blocks)
        values = torch.stack([_unit(w[0]) for w in words], dim=-1).view(len(part), num_blocks * 4)
        cut = (part % 4)[:, None] + torch.arange(run, device=device)
        out[i : i + len(part)] = values.gather(1, cut)
    return out.view(sizes)

"""Philox 4x32-10 as values in (0, 1) and as normal values: one pass over the output, where torch's integer arithmetic
reads and writes 64-bit words about eighty times a block.

Words are equal bit for bit on every device, and so are uniform values; logarithm, sine and cosine may differ in the last bits.
`ecdit_train.keyed` says what keys, positions and indices mean. The kernel's rounds are Triton's own `tl.philox`.

Legend: B positions, N values per position, W = 4 words of 32 bits per Philox block.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .language import constexpr, jit, launches, next_power_of_2, tl

MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_BLOCKS = 256
"""Philox blocks of a program."""

Key = tuple[int, int]
"""Two words of 32 bits."""


def philox(counter: tuple[Tensor | int, Tensor | int, Tensor | int, Tensor | int], key: Key) -> list[Tensor]:
    """Four 32-bit words per counter, as int64 tensors in [0, 2^32); counters are broadcast against each other.

    Products of two 32-bit words wrap in int64, but their low 64 bits are exact, so shift and mask give both halves.
    """
    c0, c1, c2, c3 = (c if isinstance(c, Tensor) else torch.tensor(c) for c in counter)
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = ((p1 >> 32) & MASK) ^ c1 ^ k0, p1 & MASK, ((p0 >> 32) & MASK) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + _W0) & MASK, (k1 + _W1) & MASK
    return [c0, c1, c2, c3]


def unit(word: Tensor) -> Tensor:
    """Uniform in the open interval (0, 1), float32: the upper 23 bits, centred in their cell (with 24, the centres
    round and the last one is 1)."""
    return ((word >> 9).to(torch.float32) + 0.5) * 2.0**-23


def uniform(key: Key, position_B: Tensor, *, num: int, first_B: Tensor | None = None) -> Tensor:
    """The uniform values `first` to `first + num` (default: from 0) of each position: (B, num) float32."""
    if not launches(position_B.device):
        return uniform_twin(key, position_B, num=num, first_B=first_B)
    return _draw(*key, position_B, first_B, num, False)


def uniform_twin(key: Key, position_B: Tensor, *, num: int, first_B: Tensor | None = None) -> Tensor:
    return _cut([unit(w) for w in _words(key, position_B, num=num, first_B=first_B)], num=num, first_B=first_B)


def normal(key: Key, position_B: Tensor, *, num: int) -> Tensor:
    """`num` standard normal values for each position, by Box-Muller: (B, num) float32."""
    if not launches(position_B.device):
        return normal_twin(key, position_B, num=num)
    return _draw(*key, position_B, None, num, True)


def normal_twin(key: Key, position_B: Tensor, *, num: int) -> Tensor:
    a, b, c, d = (unit(w) for w in _words(key, position_B, num=num, first_B=None))
    ra, rc = torch.sqrt(-2.0 * torch.log(a)), torch.sqrt(-2.0 * torch.log(c))
    b, d = 2.0 * math.pi * b, 2.0 * math.pi * d
    values = [ra * torch.cos(b), ra * torch.sin(b), rc * torch.cos(d), rc * torch.sin(d)]
    return _cut(values, num=num, first_B=None)


def _num_blocks(num: int, first_B: Tensor | None) -> int:
    """Of a position; values may start at any word of a block."""
    return (num + 3) // 4 + (first_B is not None)


def _words(key: Key, position_B: Tensor, *, num: int, first_B: Tensor | None) -> list[Tensor]:
    """Four words for every (position, block): each (B, blocks)."""
    position = position_B.to(torch.int64)[:, None]
    block = torch.arange(_num_blocks(num, first_B), device=position_B.device)[None, :]
    if first_B is not None:
        block = block + (first_B // 4)[:, None]
    return philox((block & MASK, block >> 32, position & MASK, (position >> 32) & MASK), key)


def _cut(words: list[Tensor], *, num: int, first_B: Tensor | None) -> Tensor:
    values = torch.stack(words, dim=-1).flatten(1)
    if first_B is None:
        return values[:, :num]
    return values.gather(1, (first_B % 4)[:, None] + torch.arange(num, device=values.device))


@torch.library.custom_op("ecdit::draw", mutates_args=())
def _draw(k0: int, k1: int, position_B: Tensor, first_B: Tensor | None, num: int, gaussian: bool) -> Tensor:
    (B,) = position_B.shape
    out = torch.empty(B, num, device=position_B.device, dtype=torch.float32)
    if out.numel():
        blocks = _num_blocks(num, first_B)
        size = min(next_power_of_2(blocks), _BLOCKS)
        position = position_B.to(torch.int64).contiguous()
        first = position if first_B is None else first_B.to(torch.int64).contiguous()
        seed = k0 | k1 << 32
        seed -= (seed >> 63) << 64  # as the signed integer of the same bits
        _draw_kernel[(B, -(-blocks // size))](
            position, first, out, seed, num, OFFSET=first_B is not None, NORMAL=gaussian, SIZE=size
        )
    return out


@_draw.register_fake
def _(k0: int, k1: int, position_B: Tensor, first_B: Tensor | None, num: int, gaussian: bool) -> Tensor:
    return torch.empty(position_B.shape[0], num, device=position_B.device, dtype=torch.float32)


@jit
def _unit(word):  # type: ignore[no-untyped-def]
    return ((word >> 9).to(tl.float32) + 0.5) * (1.0 / 8388608.0)


@jit
def _pair(a, b):  # type: ignore[no-untyped-def]
    radius, angle = tl.sqrt(-2.0 * tl.log(a)), 6.283185307179586 * b
    return radius * tl.cos(angle), radius * tl.sin(angle)


@jit
def _draw_kernel(position, first, out, seed, num, OFFSET: constexpr, NORMAL: constexpr, SIZE: constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    at = tl.load(position + row)
    block = (tl.program_id(1) * SIZE + tl.arange(0, SIZE)).to(tl.int64)
    place = 4 * block
    if OFFSET:
        begins = tl.load(first + row)
        block += begins // 4
        place -= begins % 4
    zero = tl.zeros([SIZE], dtype=tl.int64)
    a, b, c, d = tl.philox(
        seed,
        (block & 0xFFFFFFFF).to(tl.uint32),
        (block >> 32).to(tl.uint32),
        ((at & 0xFFFFFFFF) + zero).to(tl.uint32),
        (((at >> 32) & 0xFFFFFFFF) + zero).to(tl.uint32),
    )
    a, b, c, d = _unit(a), _unit(b), _unit(c), _unit(d)
    if NORMAL:
        a, b = _pair(a, b)
        c, d = _pair(c, d)
    out += row * num
    tl.store(out + place, a, mask=(place >= 0) & (place < num))
    tl.store(out + place + 1, b, mask=(place + 1 >= 0) & (place + 1 < num))
    tl.store(out + place + 2, c, mask=(place + 2 >= 0) & (place + 2 < num))
    tl.store(out + place + 3, d, mask=(place + 3 >= 0) & (place + 3 < num))

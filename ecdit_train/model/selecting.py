"""The K largest scores, exactly, also when they lie on many ranks; no rank ever sees the others' scores.

Over ranks the scores' bits become whole numbers of the same order, and the K-th largest is found digit by digit from the top: each
round counts how often every digit occurs among the scores that are still in question, and adds the counts of all ranks. That is
three rounds for fp32 and six for fp64, of 16 KiB per problem, whatever the number of scores, and nothing waits for the device.
Equal scores win in the order (rank, place), which costs one more count per problem and rank. `config.selection` has the sizes.

NaN counts as larger than everything, as in `torch.topk`: it wins, and the loss shows it. -0 equals 0.

Legend: P problems, N candidates of each on this rank, K winners of each over all ranks; G routing groups, S tokens of a group,
I images of a group, L tokens of an image, E experts.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives  # registers the ops
from torch import Tensor

from ecdit_train.config.selection import digits

DECIDED = "ecdit::decided"
"""Name of an op that hands on who won: selective checkpointing keeps its result, so that nothing is decided twice."""

_ops = torch.ops._c10d_functional


@torch.library.custom_op(DECIDED, mutates_args=())
def decided(won: Tensor) -> Tensor:
    """The same bools. What a router decides goes through here unless `topk`, `sort` or `nonzero` decides it."""
    return won.clone()


@decided.register_fake
def _(won: Tensor) -> Tensor:
    return torch.empty_like(won)


class Ranks(Protocol):
    """Ranks whose candidates compete, in order."""

    rank: int
    size: int

    def sum(self, x: Tensor) -> Tensor:
        """Elementwise over ranks."""

    def gather(self, x: Tensor) -> Tensor:
        """(ranks, *x.shape)."""


class GroupRanks:
    """The ranks of a process group, by functional collectives: torch.compile, checkpointing and the dry run see them."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.rank, self.size, self.name = group.rank(), group.size(), group.group_name

    def sum(self, x: Tensor) -> Tensor:
        return _ops.wait_tensor(_ops.all_reduce(x.contiguous(), "sum", self.name))

    def gather(self, x: Tensor) -> Tensor:
        flat = _ops.wait_tensor(_ops.all_gather_into_tensor(x.flatten(), self.size, self.name))
        return flat.view(self.size, *x.shape)


@dataclass(frozen=True, kw_only=True)
class Largest:
    won_PN: Tensor
    """True for the winners, K per problem over all ranks."""
    last_P: Tensor
    """The smallest score that won: the K-th largest; the same on all ranks."""


@torch.no_grad()
def largest(score_PN: Tensor, winners: int, *, ranks: Ranks | None = None) -> Largest:
    """The `winners` largest scores of each problem. `ranks`: each has candidates of its own, N may differ; None: all are here.

    fp32 or fp64; there must be `winners` candidates at least.
    """
    if ranks is not None:
        return _over_ranks(score_PN, winners, ranks)
    assert 1 <= winners <= score_PN.shape[1], f"{winners} of {score_PN.shape[1]} candidates cannot win"
    sorted_PN, order_PN = score_PN.sort(dim=1, descending=True, stable=True)
    won = torch.zeros_like(score_PN, dtype=torch.bool).scatter(1, order_PN[:, :winners], True)
    return Largest(won_PN=won, last_P=sorted_PN[:, winners - 1])


def _over_ranks(score_PN: Tensor, winners: int, ranks: Ranks) -> Largest:
    P, _ = score_PN.shape
    number_PN, bits = _ordered(score_PN), 8 * score_PN.element_size()
    won = torch.zeros_like(score_PN, dtype=torch.bool)
    open_PN = torch.ones_like(won)  # equal to the K-th largest in all digits so far
    missing_P1 = number_PN.new_full((P, 1), winners)
    last_P1 = number_PN.new_zeros(P, 1)
    for shift, width in digits(P, bits=bits):
        digit_PN = (number_PN >> shift) & ((1 << width) - 1)
        count = number_PN.new_zeros(P, 1 << width).scatter_add(1, digit_PN, open_PN.to(torch.int64))
        count = ranks.sum(count)
        at_least = count.flip(1).cumsum(1).flip(1)
        # Falls with the digit: the last one that still has enough at or above it.
        last_digit_P1 = (at_least >= missing_P1).sum(1, keepdim=True) - 1
        won |= open_PN & (digit_PN > last_digit_P1)
        open_PN &= digit_PN == last_digit_P1
        missing_P1 = missing_P1 - (at_least - count).gather(1, last_digit_P1)
        last_P1 = (last_P1 << width) | last_digit_P1
    # What is still open is equal; those that come first in the global order fill the missing places.
    equal_RP1 = ranks.gather(open_PN.sum(1, keepdim=True))
    before_P1 = equal_RP1[: ranks.rank].sum(0)
    won |= open_PN & (before_P1 + open_PN.cumsum(1) <= missing_P1)
    return Largest(won_PN=decided(won), last_P=_score(last_P1[:, 0], score_PN.dtype))


_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}
_INFINITY = {torch.float32: 0x7F800000, torch.float64: 0x7FF0000000000000}
"""Bits of +inf; those of a NaN are above them, its sign apart."""


def _ordered(score: Tensor) -> Tensor:
    """int64 whose lowest bits, read without sign, are in the scores' order: of positive floats the bits themselves with the sign
    bit set, of negative ones all bits turned over."""
    kind = _BITS[score.dtype]
    info, bits = torch.iinfo(kind), score.view(kind)
    bits = torch.where(bits == info.min, 0, bits)  # -0 is 0
    bits = torch.where((bits & info.max) > _INFINITY[score.dtype], info.max, bits)
    ordered = torch.where(bits < 0, bits ^ info.max, bits)  # as a signed number
    return (ordered ^ info.min).to(torch.int64)


def _score(number: Tensor, dtype: torch.dtype) -> Tensor:
    """The float of a number that `_ordered` made."""
    kind = _BITS[dtype]
    info = torch.iinfo(kind)
    ordered = number.to(kind) ^ info.min
    return torch.where(ordered < 0, ordered ^ info.max, ordered).view(dtype)


@dataclass(frozen=True, kw_only=True)
class Problems:
    """How a tensor over (groups, images, tokens, experts) falls into problems: the axes kept apart, then those that compete."""

    shape_GILE: tuple[int, int, int, int]
    order: tuple[int, ...]
    """The dims of `shape_GILE`, those that are kept apart first."""
    num_apart: int

    @classmethod
    def of(cls, score_GSE: Tensor, *, image_tokens: int, apart: Collection[str], across_groups: bool) -> Problems:
        """`apart`: of batch, tokens and experts. `across_groups`: images of different groups compete."""
        G, S, E = score_GSE.shape
        assert S % image_tokens == 0, f"a group of {S} tokens does not hold whole images of {image_tokens}"
        kept = (not across_groups, "batch" in apart, "tokens" in apart, "experts" in apart)
        order = (*(d for d in range(4) if kept[d]), *(d for d in range(4) if not kept[d]))
        return cls(shape_GILE=(G, S // image_tokens, image_tokens, E), order=order, num_apart=sum(kept))

    def cut(self, x_GSE: Tensor) -> Tensor:
        """(G, S, E) -> (P, N)."""
        x = x_GSE.reshape(self.shape_GILE).permute(self.order)
        return x.flatten(self.num_apart).reshape(-1, self.candidates)

    def join(self, x_PN: Tensor) -> Tensor:
        """(P, N) -> (G, S, E)."""
        back = tuple(self.order.index(d) for d in range(4))
        x = x_PN.reshape([self.shape_GILE[d] for d in self.order]).permute(back)
        return x.reshape(self.shape_GILE[0], -1, self.shape_GILE[3])

    @property
    def candidates(self) -> int:
        """N."""
        n = 1
        for d in self.order[self.num_apart :]:
            n *= self.shape_GILE[d]
        return n

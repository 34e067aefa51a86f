"""Checkpointing decides once: a recomputation whose scores come out otherwise keeps the winners of the forward pass."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ecdit_train.model.selecting import DECIDED, largest
from ecdit_train.parallel.activation import contexts
from ecdit_train.parallel.recompute import DECISIONS


class Alone:
    """The only rank there is, asked as if there were others."""

    rank, size = 0, 1

    def sum(self, x: Tensor) -> Tensor:
        return x

    def gather(self, x: Tensor) -> Tensor:
        return x[None]


def winners_and_gradient(ranks: Alone | None, kept: frozenset[str]) -> tuple[Tensor, Tensor]:
    """Those of the forward pass, and the gradient of their sum after a recomputation in the opposite order of scores."""
    x = torch.randn(3, 20, generator=torch.Generator().manual_seed(0)).requires_grad_()
    signs, seen = iter((1.0, -1.0)), []

    def forward(x: Tensor) -> Tensor:
        won = largest(next(signs) * x, 5, ranks=ranks).won_PN
        seen.append(won)
        return torch.where(won, x * x, 0.0).sum()

    context_fn = functools.partial(contexts, kept)
    checkpoint(forward, x, use_reentrant=False, preserve_rng_state=False, context_fn=context_fn).backward()
    assert len(seen) == 2, "nothing was computed again"
    return seen[0], x.grad


@pytest.mark.parametrize("ranks", [Alone(), None], ids=["over ranks", "here"])
def test_the_winners_stay(ranks):
    won, grad = winners_and_gradient(ranks, DECISIONS)
    assert torch.equal(grad != 0, won)


def test_without_keeping_the_decision_they_would_change():
    assert DECIDED in DECISIONS
    won, grad = winners_and_gradient(Alone(), DECISIONS - {DECIDED})
    assert not torch.equal(grad != 0, won)

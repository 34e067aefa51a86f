"""Experts of two layers: some products of a row, one activation of them all, one product back.

    h_i = x W_i (i = 1 .. n),   a = activate(h_1, ..., h_n),   y = a W_out

GELU experts have n = 1, gated ones n = 2. An implementation names its matrices and writes the activation forward and backward;
`compute` is the plain form, for autograd, and `model.lean` runs the same arithmetic keeping the h_i alone.

Legend: e experts on this rank, R rows of each, D hidden width, H expert hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..moe import Experts

Product = Callable[[Tensor, Tensor], Tensor]
"""(e, R, K), (e, K, O) -> (e, R, O)."""


@dataclass(frozen=True, kw_only=True)
class Activated:
    """What a backward pass needs of an activation a = f(h_1, ..., h_n), given the gradient da; (e, R, H) each."""

    a: Tensor
    """f of them, made anew."""
    dh: tuple[Tensor, ...]
    """df/dh_i * da."""
    dot_eR: Tensor
    """<a, da> of each row, fp32 at least: with y = a W_out and da = dy W_out^T it is <y, dy>, and y need not be kept."""


class TwoLayers(Experts):
    first: ClassVar[tuple[str, ...]]
    """Names of the parameters W_i (e, D, H)."""
    last: ClassVar[str] = "down"
    """Name of W_out (e, H, D)."""

    def __init__(self, num_experts: int) -> None:
        super().__init__(num_experts)
        self.products: tuple[Product, ...] = (torch.bmm,) * (len(self.first) + 1)
        """What multiplies by each of `matrices`, in the plain form."""

    def activate(self, *h_eRH: Tensor) -> Tensor:
        """a, element by element."""
        raise NotImplementedError

    def activate_forward(self, h_eRH: tuple[Tensor, ...]) -> Tensor:
        """`activate` outside of autograd."""
        return self.activate(*h_eRH)

    def activate_backward(self, h_eRH: tuple[Tensor, ...], da_eRH: Tensor) -> Activated:
        """The same, and its gradients; outside of autograd. May write into `da_eRH`."""
        raise NotImplementedError

    def matrices(self) -> tuple[Tensor, ...]:
        """W_1 .. W_n, W_out."""
        return tuple(getattr(self, name) for name in (*self.first, self.last))

    def compute(self, x_eRD: Tensor) -> Tensor:
        (*first, last), (*multiply, multiply_last) = self.matrices(), self.products
        return multiply_last(self.activate(*(by(x_eRD, w) for by, w in zip(multiply, first, strict=True))), last)


def rows_dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products over the last dim, added up in fp32 at least."""
    return (a * b).sum(-1, dtype=torch.promote_types(a.dtype, torch.float32))

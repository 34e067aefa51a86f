"""Experts of two layers: some products of a row, one activation of them all, one product back.

    h_i = x W_i (i = 1 .. n),   a = activate(h_1, ..., h_n),   y = a W_out

GELU experts have n = 1, gated ones n = 2. An implementation names its matrices and writes the activation forward and backward;
`compute` is the plain form, for autograd, and `model.lean` runs the same arithmetic keeping the h_i alone.

Legend: e experts on this rank, R rows of each, D hidden width, H expert hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ..moe import Experts


class Product(Protocol):
    """How rows are multiplied by a stack of matrices W, y = x W. Called, it differentiates itself. The methods are the same in
    parts, for a backward of one's own: what `weight` and `gradient` return is made once and read by several of them."""

    def __call__(self, x_eRK: Tensor, w_eKO: Tensor, /) -> Tensor:
        """(e, R, K), (e, K, O) -> (e, R, O)."""
        ...

    def weight(self, w_eKO: Tensor, *, back: bool = False) -> Any:
        """W as `y` reads it, or as `dx` does (`back`)."""
        ...

    def gradient(self, dy_eRO: Tensor) -> Any:
        """dy as `dx` and `dw` read it."""
        ...

    def y(self, x_eRK: Tensor, weight: Any) -> Tensor:
        """x W."""
        ...

    def dx(self, gradient: Any, weight: Any, *, into: Tensor, add: bool = False) -> None:
        """into = dy W^T, or into += dy W^T."""
        ...

    def dw(self, x_eRK: Tensor, gradient: Any, *, into: Tensor, add: bool) -> None:
        """into = x^T dy, or into += x^T dy."""
        ...


class Plain:
    """Operands as they are."""

    def __call__(self, x_eRK: Tensor, w_eKO: Tensor) -> Tensor:
        return torch.bmm(x_eRK, w_eKO)

    y = __call__

    def weight(self, w_eKO: Tensor, *, back: bool = False) -> Tensor:
        return w_eKO

    def gradient(self, dy_eRO: Tensor) -> Tensor:
        return dy_eRO

    def dx(self, gradient: Tensor, weight: Tensor, *, into: Tensor, add: bool = False) -> None:
        _product(gradient, weight.transpose(1, 2), into=into, add=add)

    def dw(self, x_eRK: Tensor, gradient: Tensor, *, into: Tensor, add: bool) -> None:
        _product(x_eRK.transpose(1, 2), gradient, into=into, add=add)


def _product(a: Tensor, b: Tensor, *, into: Tensor, add: bool) -> None:
    if add:
        into.baddbmm_(a, b)
    else:
        torch.bmm(a, b, out=into)


@dataclass(frozen=True, kw_only=True)
class Activated:
    """What a backward pass needs of an activation a = f(h_1, ..., h_n), given da and each row's gate g; (e, R, H) each."""

    a: Tensor
    """g f, made anew."""
    dh: tuple[Tensor, ...]
    """g df/dh_i * da."""
    dot_eR: Tensor
    """<f, da> of each row, fp32 at least: with y = f W_out and da = dy W_out^T it is <y, dy>, and y need not be kept."""


PLAIN = Plain()


class TwoLayers(Experts):
    first: ClassVar[tuple[str, ...]]
    """Names of the parameters W_i (e, D, H)."""
    last: ClassVar[str] = "down"
    """Name of W_out (e, H, D)."""

    def __init__(self, num_experts: int) -> None:
        super().__init__(num_experts)
        self.products: tuple[Product, ...] = (PLAIN,) * (len(self.first) + 1)
        """What multiplies by each of `matrices` in passes that train; otherwise all are PLAIN."""

    def activate(self, *h_eRH: Tensor) -> Tensor:
        """a, element by element."""
        raise NotImplementedError

    def activate_forward(self, h_eRH: tuple[Tensor, ...]) -> Tensor:
        """`activate` outside of autograd."""
        return self.activate(*h_eRH)

    def activate_backward(self, h_eRH: tuple[Tensor, ...], da_eRH: Tensor, gate_eR: Tensor) -> Activated:
        """The same, and its gradients; outside of autograd. `da_eRH` is not yet times the gate, and may be written into."""
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

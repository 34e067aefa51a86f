"""The sparse layer in one autograd function: gather -> experts -> gate -> sum, keeping what only another product could bring back.

Plain autograd keeps eleven vectors of width d for every row (the row, 4 before and 4 after the activation, the experts' result, the
weighted result). Here the pre-activations alone are kept (4), and the rows that an exchange brought (1), since a second exchange
would cost more than they do. Rows are gathered again, activations are made again, and the experts' result is not needed at all: the
gradient of a gate is <dy, y> = <dy W_out^T, a>, whose first factor backward makes anyway.

With out = sum over rows of g * y, dy the gradient of `out` at the row's token, da = dy W_out^T (not yet times g), ga = g a and
gdh_i = g f'(h_i) da, which leave the pass that makes a anew:

    dg = <a, da>      dW_out = ga^T dy      dW_i = x^T gdh_i      dx = sum_i gdh_i W_i^T

Gates stay in fp32 at home and are rounded to the rows' type where they multiply, as in the plain form; over ranks they
travel with the gradients, four bytes a row. How a matrix is multiplied by is its `Product`'s affair (8 bits, for one).

Legend: N tokens, D width, H expert hidden width, E experts (e on this rank), s slots of an expert at home, R rows that reach an
expert here, k parts that travel one after another.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .assignment import Table
from .experts.two_layers import PLAIN, Product, TwoLayers
from .moe import Dispatcher, Experts, Settled, Travel, plain


def lean(experts: Experts, dispatcher: Dispatcher, x_ND: Tensor, assignment: Settled) -> Tensor:
    """`moe.plain` with less memory: (N, D) -> (N, D). A varying number of rows takes the plain way."""
    if not isinstance(assignment, Table):
        return plain(experts, dispatcher, x_ND, assignment)
    x_ND, mine = dispatcher.enter(x_ND, assignment)
    how = Lean(local=dispatcher.local, travel=dispatcher.travel, chunks=dispatcher.chunks)
    index_Es, gate_Es = mine.index_EGC.flatten(1), mine.gate_EGC.flatten(1)
    return dispatcher.leave(experts((x_ND, gate_Es), functools.partial(how, index_Es=index_Es)))


@dataclass(frozen=True, kw_only=True)
class Lean:
    """How a layer's rows are gathered, carried and summed."""

    local: Dispatcher
    """Its `gather`, `sum` and `weigh` are used: deterministic stays deterministic."""
    travel: Travel | None = None
    """None where all experts are here."""
    chunks: int = 1
    """k; divides s."""

    def __call__(self, experts: Experts, rows: tuple[Tensor, Tensor], *, index_Es: Tensor) -> Tensor:
        """(tokens (N, D), gates (E, s)), and each slot's token -> (N, D). Called by the experts' own
        forward, with the tensors among its arguments, so that FSDP finds its weights gathered and knows when
        they have their gradients."""
        assert isinstance(experts, TwoLayers), "a rule of the configuration"
        x_ND, gate_Es = rows
        matrices = experts.matrices()
        products = experts.products if torch.is_grad_enabled() else (PLAIN,) * len(matrices)
        return _LeanExperts.apply(x_ND, gate_Es, index_Es, self, experts, products, *matrices)

    def send(self, x_ND: Tensor, index_Es: Tensor) -> Tensor:
        """A part's rows on their way to the experts."""
        E, s = index_Es.shape
        rows = self.local.gather(x_ND, index_Es.flatten()).view(E, s, -1)
        return rows if self.travel is None else self.travel.send_out(rows)

    def send_gates(self, gate_Es: Tensor) -> Tensor:
        return gate_Es[:, :, None] if self.travel is None else self.travel.send_out(gate_Es[:, :, None].contiguous())

    def arrived(self, rows: Tensor) -> Tensor:
        """(e, R, D), or gates as (e, R, 1)."""
        return rows if self.travel is None else self.travel.receive_out(rows)

    def send_back(self, rows: Tensor) -> Tensor:
        return rows if self.travel is None else self.travel.send_back(rows)

    def came_back(self, parts: list[Tensor]) -> Tensor:
        """Of all parts together: (E, s, D), slots in their order."""
        home = parts if self.travel is None else [self.travel.receive_back(part) for part in parts]
        return home[0] if len(home) == 1 else torch.cat(home, dim=1)

    def parts(self, slots_Es: Tensor) -> tuple[Tensor, ...]:
        return slots_Es.chunk(self.chunks, dim=1)


class _LeanExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        gate_Es: Tensor,
        index_Es: Tensor,
        lean: Lean,
        experts: TwoLayers,
        products: tuple[Product, ...],
        *matrices: Tensor,
    ) -> Tensor:
        *by_first, by_last = products
        flights = [lean.send(x_ND, index) for index in lean.parts(index_Es)]
        *first, last = (by.weight(w) for by, w in zip(products, matrices, strict=True))
        kept, brought, back = list[Tensor](), list[Tensor](), list[Tensor]()
        for flight in flights:
            x_eRD = lean.arrived(flight)
            h = tuple(by.y(x_eRD, w) for by, w in zip(by_first, first, strict=True))
            back.append(lean.send_back(by_last.y(experts.activate_forward(h), last)))
            kept += h
            if lean.travel is not None:
                brought.append(x_eRD)
        y_EsD = lean.came_back(back)
        ctx.save_for_backward(x_ND, gate_Es, index_Es, *matrices, *kept, *brought)
        ctx.lean, ctx.experts, ctx.products = lean, experts, products
        return lean.local.weigh(y_EsD.flatten(0, 1), gate_Es.flatten(), index_Es.flatten(), num_tokens=x_ND.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_ND: Tensor) -> tuple[Tensor | None, ...]:
        lean, experts, (*by_first, by_last) = ctx.lean, ctx.experts, ctx.products
        x_ND, gate_Es, index_Es, *rest = ctx.saved_tensors
        n = len(by_first)
        matrices, rest = rest[: n + 1], rest[n + 1 :]
        kept, brought = rest[: n * lean.chunks], rest[n * lean.chunks :]
        places = lean.parts(index_Es)
        flights = [
            (lean.send(dout_ND, index), lean.send_gates(gate))
            for index, gate in zip(places, lean.parts(gate_Es), strict=True)
        ]
        *first, last = (by.weight(w, back=True) for by, w in zip(ctx.products, matrices, strict=True))
        *dfirst, dlast = (torch.empty_like(w) for w in matrices)
        rows_back, gates_back = [], []
        for number, (rows, gates) in enumerate(flights):
            dy_eRD, h = lean.arrived(rows), kept[n * number : n * (number + 1)]
            gate_eR = lean.arrived(gates).squeeze(2).to(dy_eRD.dtype)
            x_eRD = brought[number] if brought else lean.send(x_ND, places[number])
            add = number > 0  # to what the parts before have left in the matrices' gradients
            dy, da_eRH = by_last.gradient(dy_eRD), torch.empty_like(h[0])
            by_last.dx(dy, last, into=da_eRH)
            made = experts.activate_backward(h, da_eRH, gate_eR)
            by_last.dw(made.a, dy, into=dlast, add=add)
            dx_eRD = torch.empty_like(x_eRD)
            for i, (by, w, dh_eRH) in enumerate(zip(by_first, first, made.dh, strict=True)):
                dh = by.gradient(dh_eRH)
                by.dw(x_eRD, dh, into=dfirst[i], add=add)
                by.dx(dh, w, into=dx_eRD, add=i > 0)
            rows_back.append(lean.send_back(dx_eRD))
            gates_back.append(lean.send_back(made.dot_eR[:, :, None]))
        dx_EsD, dgate_Es1 = lean.came_back(rows_back), lean.came_back(gates_back)
        dx_ND = lean.local.sum(dx_EsD.flatten(0, 1), index_Es.flatten(), num_tokens=x_ND.shape[0])
        return dx_ND, dgate_Es1.squeeze(2).to(gate_Es.dtype), None, None, None, None, *dfirst, dlast

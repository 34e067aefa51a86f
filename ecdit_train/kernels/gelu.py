"""GELU (tanh form) over rows, and its gradient with what a lean expert layer needs beside it, in one pass.

gelu(x) = x/2 * (1 + tanh u) = x * s, with u = sqrt(2/pi) * (x + 0.044715 x^3) and s = sigmoid(2u);
gelu'(x) = s + x * s * (1 - s) * 2 u'. Both from e = exp(-|2u|), which cannot overflow: s is 1 / (1 + e) or e / (1 + e),
and s * (1 - s) = e / (1 + e)^2 without the cancellation of 1 - tanh^2.

Legend: R rows, H hidden width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .language import constexpr, jit, next_power_of_2, runs, tl

SCALE, CUBE = math.sqrt(2.0 / math.pi), 0.044715
WIDEST = 1024


def gelu_rows(h_RH: Tensor) -> Tensor:
    """(R, H) -> (R, H): GELU, computed in fp32 at least. No gradient of its own."""
    return _gelu(h_RH.contiguous()) if runs(h_RH) else gelu_rows_twin(h_RH)


def gelu_rows_twin(h_RH: Tensor) -> Tensor:
    return F.gelu(h_RH, approximate="tanh")


def gelu_backward_rows(h_RH: Tensor, da_RH: Tensor, *, gate_R: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Of pre-activations h and the gradient `da` of a = gelu(h): a, dh = gelu'(h) * da, both (R, H), and <a, da> of
    each row, (R,), in fp32 at least. With gates, where `da` is the gradient before its gate: gate * a,
    gate * gelu'(h) * da, and <a, da>, which is the gate's gradient (no division by a gate that may be 0)."""
    if not runs(h_RH):
        return gelu_backward_rows_twin(h_RH, da_RH, gate_R=gate_R)
    return _gelu_backward(h_RH.contiguous(), da_RH.contiguous(), None if gate_R is None else gate_R.contiguous())


def gelu_backward_rows_twin(
    h_RH: Tensor, da_RH: Tensor, *, gate_R: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    accumulate = torch.promote_types(h_RH.dtype, torch.float32)
    h, da = h_RH.to(accumulate), da_RH.to(accumulate)
    a = F.gelu(h, approximate="tanh")
    dh = torch.ops.aten.gelu_backward(da, h, approximate="tanh")
    dot_R = (a * da).sum(-1)
    if gate_R is not None:
        gate = gate_R[:, None].to(accumulate)
        a, dh = a * gate, dh * gate
    return a.to(h_RH.dtype), dh.to(h_RH.dtype), dot_R


@torch.library.custom_op("ecdit::gelu_rows", mutates_args=())
def _gelu(h_RH: Tensor) -> Tensor:
    a_RH, size = torch.empty_like(h_RH), h_RH.numel()
    if size:
        _gelu_kernel[(-(-size // WIDEST),)](h_RH, a_RH, size, SCALE, CUBE, BLOCK=WIDEST)
    return a_RH


@_gelu.register_fake
def _(h_RH: Tensor) -> Tensor:
    return torch.empty_like(h_RH)


@torch.library.custom_op("ecdit::gelu_backward_rows", mutates_args=())
def _gelu_backward(h_RH: Tensor, da_RH: Tensor, gate_R: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    R, H = h_RH.shape
    a_RH, dh_RH = torch.empty_like(h_RH), torch.empty_like(h_RH)
    dot_R = torch.zeros(R, device=h_RH.device, dtype=torch.float32)
    if h_RH.numel():
        block = min(next_power_of_2(max(H, 16)), WIDEST)
        gate = h_RH if gate_R is None else gate_R
        _gelu_backward_kernel[(R,)](
            h_RH, da_RH, gate, a_RH, dh_RH, dot_R, H, SCALE, CUBE, GATED=gate_R is not None, BLOCK=block
        )
    return a_RH, dh_RH, dot_R


@_gelu_backward.register_fake
def _(h_RH: Tensor, da_RH: Tensor, gate_R: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(h_RH), torch.empty_like(h_RH), h_RH.new_empty(h_RH.shape[0], dtype=torch.float32)


@jit
def _gelu_kernel(h, a, size, scale, cube, BLOCK: constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    x = tl.load(h + at, mask=inside, other=0.0).to(tl.float32)
    u = scale * (x + cube * x * x * x)
    e = tl.exp(-2 * tl.abs(u))
    s = tl.where(u >= 0, 1.0, e) / (1 + e)
    tl.store(a + at, (x * s).to(a.dtype.element_ty), mask=inside)


@jit
def _gelu_backward_kernel(h, da, gate, a, dh, dot, H, scale, cube, GATED: constexpr, BLOCK: constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(gate + row).to(tl.float32) if GATED else 1.0
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, H, BLOCK):
        cols = first + tl.arange(0, BLOCK)
        inside = cols < H
        at = row * H + cols
        x = tl.load(h + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(da + at, mask=inside, other=0.0).to(tl.float32)
        u = scale * (x + cube * x * x * x)
        e = tl.exp(-2 * tl.abs(u))
        s = tl.where(u >= 0, 1.0, e) / (1 + e)
        slope = s + x * (e / ((1 + e) * (1 + e))) * 2 * scale * (1 + 3 * cube * x * x)
        total += x * s * g
        tl.store(a + at, (x * s * weight).to(a.dtype.element_ty), mask=inside)
        tl.store(dh + at, (slope * g * weight).to(dh.dtype.element_ty), mask=inside)
    tl.store(dot + row, tl.sum(total, axis=0))

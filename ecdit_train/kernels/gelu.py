"""GELU (tanh form) over rows, and its gradient with what a lean expert layer needs beside it, in one pass; not for autograd.

gelu(x) = x/2 * (1 + tanh u) = x * s, with u = sqrt(2/pi) * (x + 0.044715 x^3) and s = sigmoid(2u);
gelu'(x) = s + x * s * (1 - s) * 2 u'. The kernels make both from e = exp(-|2u|), which cannot overflow: s is 1 / (1 + e) or
e / (1 + e), and s * (1 - s) = e / (1 + e)^2 without a difference. On a CPU the twin of the gradient works in tiles that stay in its
second cache; torch's own GELU and its gradient take a hyperbolic tangent each.

Legend: R rows, in as many dims as they come in; H hidden width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .language import constexpr, jit, next_power_of_2, runs, tl

SCALE, CUBE = math.sqrt(2.0 / math.pi), 0.044715
WIDEST = 1024
TILE = 96 * 1024
"""Values of a tile of the twin, of which it holds five at a time: 2 MB in fp32."""


def gelu_rows(h_RH: Tensor) -> Tensor:
    """(R, H) -> (R, H): GELU, computed in fp32 at least."""
    return _gelu(h_RH.contiguous()) if runs(h_RH) else gelu_rows_twin(h_RH)


def gelu_rows_twin(h_RH: Tensor) -> Tensor:
    return F.gelu(h_RH, approximate="tanh")


def gelu_backward_rows(h_RH: Tensor, da_RH: Tensor, gate_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of pre-activations h, the gradient `da` of a = gelu(h) before its gate, and gates of h's type: gate * a,
    gate * gelu'(h) * da, both (R, H), and <a, da> of each row, (R,), in fp32 at least: the gate's gradient, without a
    division by a gate that may be 0."""
    if not runs(h_RH):
        return gelu_backward_rows_twin(h_RH, da_RH, gate_R)
    return _gelu_backward(h_RH.contiguous(), da_RH.contiguous(), gate_R.contiguous())


def gelu_backward_rows_twin(h_RH: Tensor, da_RH: Tensor, gate_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype, wide = h_RH.dtype, torch.promote_types(h_RH.dtype, torch.float32)
    a_RH, dh_RH = h_RH.new_empty(h_RH.shape), h_RH.new_empty(h_RH.shape)
    dot_R = h_RH.new_empty(h_RH.shape[:-1], dtype=wide)
    tiled = h_RH.device.type == "cpu" and not torch.compiler.is_compiling()  # inductor makes one loop of it all
    rows = max(1, TILE // max(h_RH.shape[-1], 1) if tiled else dot_R.numel())
    tiles = [x.flatten(0, -2).split(rows) for x in (h_RH, da_RH, gate_R[..., None], a_RH, dh_RH, dot_R[..., None])]
    for h, da, gate, a, dh, dot in zip(*tiles, strict=True):
        x, dx, g = h.to(wide), da.to(wide), gate.to(wide)
        bend = torch.mul(x, x).mul_(2.0 * SCALE * CUBE).add_(2.0 * SCALE)  # 2 u / x
        s = torch.mul(bend, x).sigmoid_()
        made = torch.mul(x, s, out=a if dtype == wide else None)
        slope = bend.mul_(3.0).sub_(4.0 * SCALE)  # 2 u'
        torch.addcmul(s, slope, torch.addcmul(made, made, s, value=-1.0), out=slope)
        torch.sum(torch.mul(made, dx, out=s), dim=-1, keepdim=True, out=dot)
        torch.mul(made, g, out=a) if dtype == wide else a.copy_(made.mul_(g))
        torch.mul(dx, g, out=s)
        torch.mul(slope, s, out=dh) if dtype == wide else dh.copy_(slope.mul_(s))
    return a_RH, dh_RH, dot_R


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
def _gelu_backward(h_RH: Tensor, da_RH: Tensor, gate_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    H = h_RH.shape[-1]
    a_RH, dh_RH = torch.empty_like(h_RH), torch.empty_like(h_RH)
    dot_R = h_RH.new_zeros(h_RH.shape[:-1], dtype=torch.float32)
    if h_RH.numel():
        block = min(next_power_of_2(max(H, 16)), WIDEST)
        _gelu_backward_kernel[(dot_R.numel(),)](h_RH, da_RH, gate_R, a_RH, dh_RH, dot_R, H, SCALE, CUBE, BLOCK=block)
    return a_RH, dh_RH, dot_R


@_gelu_backward.register_fake
def _(h_RH: Tensor, da_RH: Tensor, gate_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(h_RH), torch.empty_like(h_RH), h_RH.new_empty(h_RH.shape[:-1], dtype=torch.float32)


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
def _gelu_backward_kernel(h, da, gate, a, dh, dot, H, scale, cube, BLOCK: constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(gate + row).to(tl.float32)
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

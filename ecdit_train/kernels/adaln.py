"""LayerNorm without weights and the modulation after it, x^ (1 + scale) + shift, in one pass each way.

Where inductor compiles a block it fuses the two itself, forward at least; these kernels are for eager CUDA, where they would be two
passes over the tokens forward (and a third for the cast) and four backward, and the normalised tokens would be kept.

Legend: B images, S tokens of each, D width; x^ = (x - mean) / sqrt(var + eps) is `normed`.

With g = dh (1 + scale) + dx^ the gradient of x^:  dx = (g - mean(g) - x^ mean(g x^)) / sqrt(var + eps),  dshift = sum over S of dh,
dscale = sum over S of dh x^. The sums over tokens are made of partial sums of ROWS tokens in a fixed order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .language import constexpr, jit, next_power_of_2, runs, tl

EPS = 1e-5
"""torch's default."""
WIDEST = 8192
"""A program holds a row at once."""
ROWS = 16
"""Tokens of a program in backward."""


def fuses(x_BSD: Tensor, *, shift_BD: Tensor, scale_BD: Tensor) -> bool:
    """Whether the kernels take these."""
    one_type = x_BSD.dtype == shift_BD.dtype == scale_BD.dtype
    return one_type and x_BSD.shape[-1] <= WIDEST and runs(x_BSD) and not torch.compiler.is_compiling()


def norm_modulate(x_BSD: Tensor, *, shift_BD: Tensor, scale_BD: Tensor) -> tuple[Tensor, Tensor]:
    """(normed, modulated), both (B, S, D), differentiable."""
    if not fuses(x_BSD, shift_BD=shift_BD, scale_BD=scale_BD):
        return norm_modulate_twin(x_BSD, shift_BD=shift_BD, scale_BD=scale_BD)
    return NormModulate.apply(x_BSD, shift_BD, scale_BD, True)


def modulated_norm(x_BSD: Tensor, *, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    """The modulated tokens alone: nobody reads the others, so nobody writes them."""
    if not fuses(x_BSD, shift_BD=shift_BD, scale_BD=scale_BD):
        return norm_modulate_twin(x_BSD, shift_BD=shift_BD, scale_BD=scale_BD)[1]
    return NormModulate.apply(x_BSD, shift_BD, scale_BD, False)[1]


def norm_modulate_twin(x_BSD: Tensor, *, shift_BD: Tensor, scale_BD: Tensor) -> tuple[Tensor, Tensor]:
    normed_BSD = F.layer_norm(x_BSD, x_BSD.shape[-1:])
    return normed_BSD, normed_BSD * (1 + scale_BD[:, None]) + shift_BD[:, None]


def norm_modulate_backward(
    x_BSD: Tensor, scale_BD: Tensor, dnormed_BSD: Tensor, dh_BSD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, shift and scale, (B, S, D), (B, D), (B, D), from those of both results."""
    if not fuses(x_BSD, shift_BD=scale_BD, scale_BD=scale_BD):
        return norm_modulate_backward_twin(x_BSD, scale_BD, dnormed_BSD, dh_BSD)
    return _launch_backward(x_BSD, scale_BD, dnormed_BSD, dh_BSD)


def norm_modulate_backward_twin(
    x_BSD: Tensor, scale_BD: Tensor, dnormed_BSD: Tensor, dh_BSD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    accumulate = torch.promote_types(x_BSD.dtype, torch.float32)
    x, dh = x_BSD.to(accumulate), dh_BSD.to(accumulate)
    variance, mean = torch.var_mean(x, dim=-1, correction=0, keepdim=True)
    rate = (variance + EPS).rsqrt()
    normed = (x - mean) * rate
    g = dh * (1 + scale_BD[:, None].to(accumulate)) + dnormed_BSD
    dx = (g - g.mean(-1, keepdim=True) - normed * (g * normed).mean(-1, keepdim=True)) * rate
    dshift, dscale = dh.sum(1), (dh * normed).sum(1)
    return dx.to(x_BSD.dtype), dshift.to(scale_BD.dtype), dscale.to(scale_BD.dtype)


class NormModulate(torch.autograd.Function):
    """`apply(x_BSD, shift_BD, scale_BD, both)` -> (normed, or nothing, and modulated). Keeps x alone; mean and variance
    are made again from the row that backward reads anyway."""

    @staticmethod
    def forward(ctx, x_BSD: Tensor, shift_BD: Tensor, scale_BD: Tensor, both: bool) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x_BSD, scale_BD)
        ctx.set_materialize_grads(False)
        return _forward(x_BSD.contiguous(), shift_BD.contiguous(), scale_BD.contiguous(), both)

    @staticmethod
    def backward(ctx, dnormed_BSD: Tensor | None, dh_BSD: Tensor | None) -> tuple[Tensor, Tensor, Tensor, None]:
        x_BSD, scale_BD = ctx.saved_tensors
        if dh_BSD is None:
            dh_BSD = torch.zeros_like(x_BSD)
        return *_launch_backward(x_BSD, scale_BD, dnormed_BSD, dh_BSD), None


def _launch_backward(
    x_BSD: Tensor, scale_BD: Tensor, dnormed_BSD: Tensor | None, dh_BSD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dnormed = None if dnormed_BSD is None else dnormed_BSD.contiguous()
    dx, partial_2BTD = _backward(x_BSD.contiguous(), scale_BD.contiguous(), dnormed, dh_BSD.contiguous())
    dshift, dscale = partial_2BTD.sum(2).to(scale_BD.dtype).unbind(0)
    return dx, dshift, dscale


def _size(D: int) -> dict[str, int]:
    block = next_power_of_2(max(D, 16))
    return {"BLOCK": block, "num_warps": 4 if block <= 2048 else 8}


@torch.library.custom_op("ecdit::norm_modulate", mutates_args=())
def _forward(x_BSD: Tensor, shift_BD: Tensor, scale_BD: Tensor, both: bool) -> tuple[Tensor, Tensor]:
    B, S, D = x_BSD.shape
    normed, h = x_BSD.new_empty(x_BSD.shape if both else (0,)), torch.empty_like(x_BSD)
    if x_BSD.numel():
        _forward_kernel[(B * S,)](x_BSD, shift_BD, scale_BD, normed, h, S, D, EPS, BOTH=both, **_size(D))
    return normed, h


@_forward.register_fake
def _(x_BSD: Tensor, shift_BD: Tensor, scale_BD: Tensor, both: bool) -> tuple[Tensor, Tensor]:
    return x_BSD.new_empty(x_BSD.shape if both else (0,)), torch.empty_like(x_BSD)


@torch.library.custom_op("ecdit::norm_modulate_backward", mutates_args=())
def _backward(x_BSD: Tensor, scale_BD: Tensor, dnormed_BSD: Tensor | None, dh_BSD: Tensor) -> tuple[Tensor, Tensor]:
    """dx, and the partial sums of dshift and dscale, (2, B, programs of an image, D) fp32."""
    B, S, D = x_BSD.shape
    dx, parts = torch.empty_like(x_BSD), -(-S // ROWS)
    partial = torch.zeros(2, B, parts, D, device=x_BSD.device, dtype=torch.float32)
    if x_BSD.numel():
        dnormed = x_BSD if dnormed_BSD is None else dnormed_BSD
        _backward_kernel[(B, parts)](
            x_BSD, scale_BD, dnormed, dh_BSD, dx, partial, S, D, B * parts * D, EPS,
            NORMED=dnormed_BSD is not None, ROWS=ROWS, **_size(D),
        )  # fmt: skip
    return dx, partial


@_backward.register_fake
def _(x_BSD: Tensor, scale_BD: Tensor, dnormed_BSD: Tensor | None, dh_BSD: Tensor) -> tuple[Tensor, Tensor]:
    B, S, D = x_BSD.shape
    return torch.empty_like(x_BSD), x_BSD.new_empty(2, B, -(-S // ROWS), D, dtype=torch.float32)


@jit
def _normed(x, at, inside, D, eps):  # type: ignore[no-untyped-def]
    """A row, normalised, and the rate that did it; 0 beside the row."""
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    centred = tl.where(inside, value - tl.sum(value, axis=0) / D, 0.0)
    rate = 1 / tl.sqrt(tl.sum(centred * centred, axis=0) / D + eps)
    return centred * rate, rate


@jit
def _forward_kernel(x, shift, scale, normed, h, S, D, eps, BOTH: constexpr, BLOCK: constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside, at, image = cols < D, row * D + cols, row // S * D + cols
    value, _ = _normed(x, at, inside, D, eps)
    if BOTH:
        tl.store(normed + at, value.to(normed.dtype.element_ty), mask=inside)
    up = 1 + tl.load(scale + image, mask=inside, other=0.0).to(tl.float32)
    value = value * up + tl.load(shift + image, mask=inside, other=0.0).to(tl.float32)
    tl.store(h + at, value.to(h.dtype.element_ty), mask=inside)


@jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    x, scale, dnormed, dh, dx, partial, S, D, apart, eps, NORMED: constexpr, ROWS: constexpr, BLOCK: constexpr
):
    image, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    cols = tl.arange(0, BLOCK)
    inside = cols < D
    up = 1 + tl.load(scale + image * D + cols, mask=inside, other=0.0).to(tl.float32)
    dshift, dscale = tl.zeros([BLOCK], dtype=tl.float32), tl.zeros([BLOCK], dtype=tl.float32)
    for token in range(part * ROWS, min(part * ROWS + ROWS, S)):
        at = (image * S + token) * D + cols
        value, rate = _normed(x, at, inside, D, eps)
        grad = tl.load(dh + at, mask=inside, other=0.0).to(tl.float32)
        dshift += grad
        dscale += grad * value
        g = grad * up
        if NORMED:
            g += tl.load(dnormed + at, mask=inside, other=0.0).to(tl.float32)
        g = (g - tl.sum(g, axis=0) / D - value * (tl.sum(g * value, axis=0) / D)) * rate
        tl.store(dx + at, g.to(dx.dtype.element_ty), mask=inside)
    out = partial + (image * tl.num_programs(1) + part) * D + cols
    tl.store(out, dshift, mask=inside)
    tl.store(out + apart, dscale, mask=inside)

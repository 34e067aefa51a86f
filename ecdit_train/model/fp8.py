"""Matrix products of 8-bit operands, worked out in plain torch: what a GPU's scaled product gives, but for the order of its sums.

    forward    y  = Q(x) Q(W)          x and W in E4M3 (4 significant bits, largest 448)
    backward   dx = Q(dy) Q(W)^T       dy in E5M2 (3 significant bits, largest 57344), E4M3 with blocks
               dW = Q(x)^T Q(dy)

Q(t) = s * round(t / s), the rounding being to the 8-bit type, to nearest, ties to even. Products of two such values are exact in
fp32, and are added up in fp32 (fp64 for doubles). Every s is a power of two, so Q(t) is exact in bf16, and another choice of s
changes only values that saturate or that lie under the smallest normal number: s is the least power of two that holds the largest
magnitude, so with E4M3 that is what is below 2^-13 of it.

current   one s for a tensor (of each expert, in a stack), from its largest magnitude now
delayed   the same from the largest of the last `HISTORY` steps: known before the tensor is; of now while nothing is remembered
mxfp8     one s for every 32 values along the dim that is summed over, as E8M0 (OCP MX 1.0), rounded up so that nothing saturates

These are the products of training passes; drawing and validation multiply in bf16.

Zeros stay zeros (s = 1 where all are). A value that is not finite makes all of its tensor or block not finite, and what is made of
it: an 8-bit type would turn it into 448 in silence, and no guard would see it. A finite value past the largest saturates.

Legend: e matrices of a stack (one for a linear layer), R rows, K width that is summed over, O width of the result, H steps back.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ecdit_train.config.schema import Recipe

from . import te_products

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
Backend = Literal["scaled_mm", "transformer_engine", "emulated"]
UNIT = 16
"""Sizes of a scaled product are multiples of it."""
BLOCK = 32
"""Values that share a scale under mxfp8."""
HISTORY = 16
"""H: steps whose largest magnitudes `delayed` remembers."""
ROLES = ("x", "w", "dy")
LEAST, MOST = -126, 127
"""Exponents of a scale: normal numbers of fp32 and bf16, and of E8M0."""


@dataclass(frozen=True, kw_only=True)
class Quantised:
    """s * values."""

    values: Tensor
    """E4M3 or E5M2."""
    scale: Tensor
    """fp32 powers of two, to be broadcast against the values. Of blocks under Transformer Engine: as `te_products` has them."""

    def wide(self, dtype: torch.dtype) -> Tensor:
        return self.values.to(dtype) * self.scale.to(dtype)

    def turned(self) -> Quantised:
        """Every matrix transposed."""
        return Quantised(values=self.values.transpose(1, 2), scale=self.scale.transpose(1, 2))


def power_of_two(amax: Tensor, fp8: torch.dtype) -> Tensor:
    """The least power of two s with amax <= s * (largest of the type), fp32; 1 for 0, NaN for what is not finite."""
    # Whole numbers and fp32 alone: nothing is rounded, and inductor has no vectors of a double's exponents.
    most, at = math.frexp(torch.finfo(fp8).max)
    part, exponent = torch.frexp(amax)
    exponent = (exponent - at + (part > most)).clamp(LEAST, MOST)
    scale = ((exponent + 127) << 23).view(torch.float32)
    scale = torch.where(amax == 0, 1.0, scale)
    return torch.where(amax.isfinite(), scale, torch.nan)


def quantise(t: Tensor, scale: Tensor, fp8: torch.dtype, *, backend: Backend = "emulated") -> Quantised:
    """t / scale in 8 bits: saturating, but what is not finite becomes NaN. `transformer_engine` takes one scale for each matrix."""
    if backend == "transformer_engine" and t.numel() > 0:
        values, scale = te_products.cast(t, scale, fp8)
        return Quantised(values=values, scale=scale)
    wide, most = torch.promote_types(t.dtype, torch.float32), torch.finfo(fp8).max
    v = t.to(wide) / scale.to(wide)
    v = torch.where(v.isfinite(), v.clamp(-most, most), torch.nan)
    return Quantised(values=v.float().to(fp8), scale=scale)  # as torch rounds doubles, too


def multiply(a_eRK: Quantised, b_eKO: Quantised, *, dtype: torch.dtype, backend: Backend) -> Tensor:
    """(e, R, O) of type `dtype`. `scaled_mm` takes one scale for each matrix."""
    if backend == "emulated":
        wide = torch.promote_types(dtype, torch.float32)
        return torch.bmm(a_eRK.wide(wide), b_eKO.wide(wide)).to(dtype)
    (e, R, _), O = a_eRK.values.shape, b_eKO.values.shape[2]
    if a_eRK.values.numel() == 0:
        return a_eRK.scale.new_zeros(e, R, O, dtype=dtype)
    if backend == "transformer_engine":
        return te_products.product(a_eRK.values, a_eRK.scale, b_eKO.values, b_eKO.scale, dtype=dtype)
    y_eRO = a_eRK.scale.new_empty(e, R, O, dtype=dtype)
    for n in range(e):
        # Both are read along what is summed over: the second one column by column. Rows are filled up to whole units.
        a, b = _filled(a_eRK.values[n]), _filled(b_eKO.values[n].t())
        y = torch._scaled_mm(
            a, b.t(), scale_a=a_eRK.scale[n].squeeze(), scale_b=b_eKO.scale[n].squeeze(), out_dtype=dtype
        )
        y_eRO[n] = y[:, :O]
    return y_eRO


def _filled(rows_RK: Tensor) -> Tensor:
    """Dense in memory, with zeros after the last of K up to a whole unit."""
    rest = -rows_RK.shape[1] % UNIT
    if rest == 0:
        return rows_RK.contiguous()
    # As bytes: torch pads no 8-bit floats; 0 is 0 in both.
    return nn.functional.pad(rows_RK.contiguous().view(torch.uint8), (0, rest)).view(rows_RK.dtype)


def amax_of(t_eRK: Tensor) -> Tensor:
    """(e,): largest magnitude of each matrix; 0 where there are no rows, NaN or inf where one is inside."""
    if t_eRK.numel() == 0:
        return t_eRK.new_zeros(t_eRK.shape[0], dtype=torch.float32)
    return t_eRK.detach().abs().amax((1, 2)).float()


def block_scale(t_eRK: Tensor, fp8: torch.dtype, *, along: int) -> Tensor:
    """The scale of every value, blocks of 32 lying along dim 1 or 2; a last, shorter one is a block of its own."""
    size = t_eRK.shape[along]
    if t_eRK.numel() == 0:
        return torch.ones_like(t_eRK, dtype=torch.float32)
    t = t_eRK.detach().abs().movedim(along, -1)
    blocks = nn.functional.pad(t, (0, -size % BLOCK)).unflatten(-1, (-1, BLOCK))
    scale = power_of_two(blocks.amax(-1).float(), fp8)
    return scale.repeat_interleave(BLOCK, dim=-1)[..., :size].movedim(-1, along)


class Fp8Product(nn.Module):
    """How one layer's product is scaled; a child of the layer named `fp8`. Holds what `delayed` remembers."""

    amax: Tensor
    """(e, 3, H) fp32, `delayed` alone: largest magnitudes of x, W and dy in the last steps, newest first; 0: not yet."""

    def __init__(self, recipe: Recipe, *, stack: int = 1, backend: Backend = "emulated") -> None:
        """`stack`: e, over all ranks."""
        super().__init__()
        self.recipe = recipe
        self.backend = backend
        self.stack, self.first = stack, 0
        """Of the whole stack, where this rank's part begins."""
        self.unit = 1
        """Gradients of a rank are those of its own mean, so many times what they are in the mean of the global batch, of which
        `delayed` remembers: on more ranks, what is remembered is not too small."""
        self.agree: Callable[[Tensor], Tensor] | None = None
        """Own amax -> that of the whole tensor, where each rank holds a part of it."""
        self.amax_of, self.block_scale = amax_of, block_scale
        self.cast: Callable[..., Quantised] = functools.partial(quantise, backend=backend)
        """What passes over every value. Compiled, each is one loop."""
        self.seen: dict[str, Tensor] = {}
        """By role (e,): largest magnitudes since the last update. A maximum, so a pass that is repeated does not count twice."""
        if recipe == "delayed":
            self.register_buffer("amax", torch.empty(stack, len(ROLES), HISTORY, dtype=torch.float32))

    def reset_buffers(self) -> None:
        """Nothing is remembered."""
        self.amax.zero_()

    def forward(self, x_eRK: Tensor, w_eKO: Tensor) -> Tensor:
        """(e, R, K), (e, K, O) -> (e, R, O) in the type of x. Where nobody asks for gradients (drawing, validation) the product is
        that of x's own type: a picture must not depend on how large another one in its batch is."""
        if not torch.is_grad_enabled():
            return torch.bmm(x_eRK, w_eKO)
        return _Product.apply(x_eRK, w_eKO, self)

    def linear(self, x: Tensor, w_OK: Tensor) -> Tensor:
        """(..., K), (O, K) -> (..., O), as `nn.functional.linear`."""
        return self(x.reshape(1, -1, x.shape[-1]), w_OK.t()[None]).view(*x.shape[:-1], len(w_OK))

    # The same in parts (`experts.two_layers.Product`).

    def weight(self, w_eKO: Tensor, *, back: bool = False) -> Quantised:
        return self.quantise(w_eKO, "w", along=2 if back else 1)

    def gradient(self, dy_eRO: Tensor) -> tuple[Quantised, Quantised]:
        """For the sum over O, and for that over R."""
        over_O = self.quantise(dy_eRO, "dy", along=2)
        return over_O, self.quantise(dy_eRO, "dy", along=1) if self.by_block else over_O

    def y(self, x_eRK: Tensor, weight: Quantised) -> Tensor:
        return multiply(self.quantise(x_eRK, "x", along=2), weight, dtype=x_eRK.dtype, backend=self.backend)

    def dx(self, gradient: tuple[Quantised, Quantised], weight: Quantised, *, into: Tensor, add: bool = False) -> None:
        dx_eRK = multiply(gradient[0], weight.turned(), dtype=into.dtype, backend=self.backend)
        into.add_(dx_eRK) if add else into.copy_(dx_eRK)

    def dw(self, x_eRK: Tensor, gradient: tuple[Quantised, Quantised], *, into: Tensor, add: bool) -> None:
        x = self.quantise(x_eRK, "x", along=1)
        dw_eKO = multiply(x.turned(), gradient[1], dtype=into.dtype, backend=self.backend)
        into.add_(dw_eKO) if add else into.copy_(dw_eKO)

    @property
    def by_block(self) -> bool:
        return self.recipe == "mxfp8"

    def quantise(self, t_eRK: Tensor, role: str, *, along: int) -> Quantised:
        """`along`: the dim that is summed over."""
        if self.by_block and self.backend == "transformer_engine" and t_eRK.numel() > 0:
            values, scale = te_products.cast_blocks(t_eRK, along=along)
            return Quantised(values=values, scale=scale)
        fp8 = E5M2 if role == "dy" and not self.by_block else E4M3
        scale = self.block_scale(t_eRK, fp8, along=along) if self.by_block else self._one_scale(t_eRK, role, fp8)
        return self.cast(t_eRK, scale, fp8)

    def _one_scale(self, t_eRK: Tensor, role: str, fp8: torch.dtype) -> Tensor:
        now = self.amax_of(t_eRK)
        if self.agree is not None:
            now = self.agree(now)
        if self.recipe == "delayed":
            unit = self.unit if role == "dy" else 1
            seen = now / unit
            self.seen[role] = torch.maximum(self.seen[role], seen) if role in self.seen else seen
            past = self.amax[:, ROLES.index(role)].amax(-1) * unit
            # While nothing is remembered, a scale of 1 would turn gradients of 1e-6 into zeros.
            now = torch.where(past == 0, now, past)
        return power_of_two(now, fp8)[:, None, None]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_eRK: Tensor, w_eKO: Tensor, how: Fp8Product) -> Tensor:
        x = how.quantise(x_eRK, "x", along=2)
        w = how.quantise(w_eKO, "w", along=1)
        # Of x, 8 bits are kept. W is kept as it is: FSDP frees it and gathers it again.
        kept = how.quantise(x_eRK, "x", along=1) if how.by_block else x
        ctx.save_for_backward(kept.values, kept.scale, w_eKO, None if how.by_block else w.scale)
        ctx.how, ctx.x_dtype = how, x_eRK.dtype
        return multiply(x, w, dtype=x_eRK.dtype, backend=how.backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_eRO: Tensor) -> tuple[Tensor | None, ...]:
        how: Fp8Product = ctx.how
        x_values, x_scale, w_eKO, w_scale = ctx.saved_tensors
        dy = how.quantise(dy_eRO, "dy", along=2)
        dx = dw = None
        if ctx.needs_input_grad[0]:
            w = how.quantise(w_eKO, "w", along=2) if how.by_block else how.cast(w_eKO, w_scale, E4M3)
            dx = multiply(dy, w.turned(), dtype=ctx.x_dtype, backend=how.backend)
        if ctx.needs_input_grad[1]:
            if how.by_block:
                dy = how.quantise(dy_eRO, "dy", along=1)
            x = Quantised(values=x_values, scale=x_scale)
            dw = multiply(x.turned(), dy, dtype=w_eKO.dtype, backend=how.backend)
        return dx, dw, None, None


def products(model: nn.Module) -> list[Fp8Product]:
    """Those that remember, in the model's order."""
    return [m for m in model.modules() if isinstance(m, Fp8Product) and m.recipe == "delayed"]


def forget(model: nn.Module) -> None:
    """What a step saw whose update was not made."""
    for product in products(model):
        product.seen.clear()


@torch.no_grad()
def remember(model: nn.Module, *, maximum: Callable[[Tensor], Tensor], refuse: Tensor | None = None) -> None:
    """Once after every optimizer step: the largest magnitudes that it saw, over all ranks (`maximum`), become the newest of those
    remembered. Where the device refuses the update (`refuse` is not 0) every bit stays; either way they are seen no more."""
    found = products(model)
    if not found:
        return
    mine = []
    for p in found:
        e3 = p.amax.new_zeros(p.stack, len(ROLES))
        for role, amax in p.seen.items():
            e3[p.first : p.first + p.amax.shape[0], ROLES.index(role)] = amax
        mine.append(e3.flatten())
    agreed = maximum(torch.cat(mine)).split([m.numel() for m in mine])
    for p, values in zip(found, agreed, strict=True):
        newest = values.view(p.stack, len(ROLES))[p.first : p.first + p.amax.shape[0]]
        # What no pass met (a layer without rows) pushes nothing out.
        shifted = torch.cat([newest[..., None], p.amax[..., :-1]], dim=-1)
        stays = newest[..., None] == 0
        if refuse is not None:
            stays = stays | (refuse != 0)
        p.amax.copy_(torch.where(stays, p.amax, shifted))
        p.seen.clear()

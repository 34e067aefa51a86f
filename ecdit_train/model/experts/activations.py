"""GELU as the lean layer needs it: forward alone, and backward together with the activation itself, from the pre-activation.

The tanh form is h * sigmoid(2 u) with u = k (h + c h^3), so one sigmoid gives everything:

    s = sigmoid(2 u)     gelu(h) = h s     gelu'(h) = s + h s (1 - s) 2 u',   2 u' = 2 k (1 + 3 c h^2)

On CUDA that is a kernel (`ecdit_train.kernels.gelu`). On a CPU it is worked out in tiles that stay in its second cache,
in fp32 whatever the tensors' type; torch's own GELU and its gradient take a hyperbolic tangent each.

Legend: R rows of all experts, H expert hidden width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ecdit_train.kernels import language
from ecdit_train.kernels.gelu import gelu_backward_rows, gelu_rows

K, C = math.sqrt(2.0 / math.pi), 0.044715
TILE = 96 * 1024
"""Values of a tile, of which backward holds five at a time: 2 MB in fp32."""


def gelu(h: Tensor) -> Tensor:
    """gelu(h), tanh form; not for autograd."""
    if language.runs(h):
        return gelu_rows(h.flatten(0, -2)).view_as(h)
    return F.gelu(h, approximate="tanh")


def gelu_backward(h: Tensor, da: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """gelu(h), gelu'(h) * da, and the inner product <gelu(h), da> of each row, fp32 at least."""
    if language.runs(h):
        a, dh, dot = gelu_backward_rows(h.flatten(0, -2), da.flatten(0, -2))
        return a.view_as(h), dh.view_as(h), dot.view(h.shape[:-1])
    wide = torch.promote_types(h.dtype, torch.float32)
    a, dh, dot = torch.empty_like(h), torch.empty_like(h), h.new_empty(h.shape[:-1], dtype=wide)
    tiled = h.device.type == "cpu" and not torch.compiler.is_compiling()  # inductor makes one loop of it all
    rows = max(1, TILE // h.shape[-1] if tiled else dot.numel())
    tiles = [x.flatten(0, -2).split(rows) for x in (h, da, a, dh, dot[..., None])]
    for h_rH, da_rH, a_rH, dh_rH, dot_r1 in zip(*tiles, strict=True):
        x, dx = h_rH.to(wide), da_rH.to(wide)
        bend = torch.mul(x, x).mul_(2.0 * K * C).add_(2.0 * K)  # 2 u / h
        s = torch.mul(bend, x).sigmoid_()
        made = torch.mul(x, s, out=a_rH if h.dtype == wide else None)
        slope = bend.mul_(3.0).sub_(4.0 * K)  # 2 u'
        torch.addcmul(s, slope, torch.addcmul(made, made, s, value=-1.0), out=slope)
        torch.sum(torch.mul(made, dx, out=s), dim=-1, keepdim=True, out=dot_r1)
        if h.dtype == wide:
            torch.mul(slope, dx, out=dh_rH)
        else:
            a_rH.copy_(made)
            dh_rH.copy_(slope.mul_(dx))
    return a, dh, dot

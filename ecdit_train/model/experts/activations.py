"""GELU as the lean layer needs it: forward alone, and backward together with the activation itself, from the pre-activation.

The tanh form is h * sigmoid(2 u) with u = k (h + c h^3), so one sigmoid gives everything:

    s = sigmoid(2 u)     gelu(h) = h s     gelu'(h) = s + h s (1 - s) 2 u',   2 u' = 2 k (1 + 3 c h^2)

On a CPU it is worked out in tiles that stay in its second cache, in fp32 whatever the tensors' type: half of the time of torch's own
GELU and gradient, each of which takes a hyperbolic tangent of its own (`python -m benchmarks.moe_layer`).

Legend: R rows of all experts, H expert hidden width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

K, C = math.sqrt(2.0 / math.pi), 0.044715
TILE = 48 * 1024
"""Values of a tile: with the six that backward holds, 1.2 MB in fp32."""


def gelu(h: Tensor) -> Tensor:
    """gelu(h), tanh form; not for autograd."""
    a = torch.empty_like(h)
    for h_rH, a_rH in zip(*(x.flatten(0, -2).split(_rows(h)) for x in (h, a)), strict=True):
        wide = h_rH.to(_wide(h))
        a_rH.copy_(_sigmoid(wide * wide, wide).mul_(wide))
    return a


def gelu_backward(h: Tensor, da: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """gelu(h), gelu'(h) * da, and the inner product <gelu(h), da> of each row, fp32 at least."""
    wide, rows = _wide(h), _rows(h)
    a, dh, dot = torch.empty_like(h), torch.empty_like(h), h.new_empty(h.shape[:-1], dtype=wide)
    tiles = [x.flatten(0, -2).split(rows) for x in (h, da, a, dh, dot[..., None])]
    for h_rH, da_rH, a_rH, dh_rH, dot_r1 in zip(*tiles, strict=True):
        h_rH, da_rH = h_rH.to(wide), da_rH.to(wide)
        square = h_rH * h_rH
        s = _sigmoid(square, h_rH)
        activated = h_rH * s
        slope = square.mul_(6.0 * K * C).add_(2.0 * K)  # 2 u'
        slope.mul_(torch.addcmul(activated, activated, s, value=-1.0)).add_(s)
        torch.sum(torch.mul(activated, da_rH, out=s), dim=-1, keepdim=True, out=dot_r1)
        a_rH.copy_(activated)
        dh_rH.copy_(slope.mul_(da_rH))
    return a, dh, dot


def _sigmoid(square: Tensor, h: Tensor) -> Tensor:
    """sigmoid(2 u)."""
    return torch.mul(square, 2.0 * K * C).add_(2.0 * K).mul_(h).sigmoid_()


def _wide(h: Tensor) -> torch.dtype:
    return torch.promote_types(h.dtype, torch.float32)


def _rows(h: Tensor) -> int:
    """Of a tile; all of them on a GPU."""
    return max(1, TILE // h.shape[-1] if h.device.type == "cpu" else h.shape[:-1].numel())

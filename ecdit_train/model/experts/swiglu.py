"""Experts with a gate, E_i(x) = (silu(x W1_i) * x W2_i) W3_i (SwiGLU, Shazeer 2020), as batched products over stacked weights.

Three matrices where GELU experts have two: at equal parameters and FLOPs the hidden width is 2/3 (`moe.expert_ratio`).

Legend: e experts on this rank, R rows of each, D hidden width, H expert hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecdit_train.config.slots import ExpertsConfig

from ..feed_forward import GatedFeedForward
from .two_layers import Activated, TwoLayers, rows_dot


@dataclass(frozen=True, kw_only=True)
class SwiGLU(ExpertsConfig):
    """Three bias-free matrices: a gate and a value of the hidden width, multiplied, then one back."""

    shared_matrices: ClassVar[int] = 3
    lean: ClassVar[bool] = True

    def lean_values_per_row(self, *, width: int, hidden: int) -> float:
        """The gate before its activation, and the value."""
        return 2.0 * hidden

    def flops_per_row(self, *, width: int, hidden: int) -> float:
        return 6.0 * width * hidden

    def kept_values_per_row(self, *, width: int, hidden: int) -> float:
        """The gate before and after its activation, the value, their product, and the result."""
        return 4.0 * hidden + width

    def build(self, *, width: int, hidden: int, num_experts: int) -> SwiGLUExperts:
        return SwiGLUExperts(width, hidden=hidden, num_experts=num_experts)

    def build_shared(self, *, width: int, hidden: int) -> GatedFeedForward:
        return GatedFeedForward(width, hidden=hidden)


class SwiGLUExperts(TwoLayers):
    """Gate and value are parameters of their own, not one of twice the width: first values and optimizers that work matrix by
    matrix see each as what it is."""

    first = ("gate", "up")

    def __init__(self, width: int, *, hidden: int, num_experts: int) -> None:
        super().__init__(num_experts)
        self.gate = nn.Parameter(torch.empty(num_experts, width, hidden))
        self.up = nn.Parameter(torch.empty(num_experts, width, hidden))
        self.down = nn.Parameter(torch.empty(num_experts, hidden, width))

    def activate(self, *h_eRH: Tensor) -> Tensor:
        gate, value = h_eRH
        return F.silu(gate) * value

    def activate_backward(self, h_eRH: tuple[Tensor, ...], da_eRH: Tensor, gate_eR: Tensor) -> Activated:
        gate, value = h_eRH
        open_eRH = F.silu(gate)
        a = open_eRH * value
        dot_eR = rows_dot(a, da_eRH)
        da_eRH.mul_(gate_eR[..., None])
        dgate = torch.ops.aten.silu_backward(da_eRH * value, gate)
        return Activated(a=a.mul_(gate_eR[..., None]), dh=(dgate, open_eRH.mul_(da_eRH)), dot_eR=dot_eR)

"""Experts of one's own: SwiGLU, E_i(x) = (silu(x W1_i) * (x W2_i)) W3_i.

Legend: e experts on this rank, R rows of each, D hidden width, H expert hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecdit_train.config.slots import ExpertsConfig
from ecdit_train.model.moe import Experts


@dataclass(frozen=True, kw_only=True)
class SwiGLU(ExpertsConfig):
    """Three bias-free matrices with a gate; 2/3 of the hidden width, so that parameters and FLOPs are those of two."""

    def _inner(self, hidden: int) -> int:
        return 2 * hidden // 3

    def flops_per_row(self, *, width: int, hidden: int) -> float:
        return 6.0 * width * self._inner(hidden)

    def kept_values_per_row(self, *, width: int, hidden: int) -> float:
        return 4.0 * self._inner(hidden) + width

    def build(self, *, width: int, hidden: int, num_experts: int) -> SwiGLUExperts:
        return SwiGLUExperts(width, inner=self._inner(hidden), num_experts=num_experts)


class SwiGLUExperts(Experts):
    def __init__(self, width: int, *, inner: int, num_experts: int) -> None:
        super().__init__(num_experts)
        self.up = nn.Parameter(torch.empty(num_experts, width, inner))
        self.gate = nn.Parameter(torch.empty(num_experts, width, inner))
        self.down = nn.Parameter(torch.empty(num_experts, inner, width))

    def compute(self, x_eRD: Tensor) -> Tensor:
        h_eRH = F.silu(torch.bmm(x_eRD, self.up)) * torch.bmm(x_eRD, self.gate)
        return torch.bmm(h_eRH, self.down)

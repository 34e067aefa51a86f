"""The paper's experts: two bias-free layers with GELU, E_i(x) = GELU(x W1_i) W2_i, as one batched product over stacked weights.

Legend: e experts on this rank, R rows of each, D hidden width, H expert hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecdit_train.config.slots import ExpertsConfig
from ecdit_train.kernels.gelu import gelu_backward_rows, gelu_rows

from ..feed_forward import FeedForward
from .two_layers import Activated, TwoLayers


@dataclass(frozen=True, kw_only=True)
class Gelu(ExpertsConfig):
    """Two bias-free layers with GELU between them, the same as the dense feed-forward."""

    shared_matrices: ClassVar[int] = 2
    lean: ClassVar[bool] = True

    def lean_values_per_row(self, *, width: int, hidden: int) -> float:
        """Before the activation."""
        return float(hidden)

    def build(self, *, width: int, hidden: int, num_experts: int) -> GeluExperts:
        return GeluExperts(width, hidden=hidden, num_experts=num_experts)

    def build_shared(self, *, width: int, hidden: int) -> FeedForward:
        return FeedForward(width, hidden=hidden)


class GeluExperts(TwoLayers):
    """Indexing the stacked weights by expert in a loop would allocate a full-size zero gradient for each; one
    batched product does not."""

    first = ("up",)

    def __init__(self, width: int, *, hidden: int, num_experts: int) -> None:
        super().__init__(num_experts)
        self.up = nn.Parameter(torch.empty(num_experts, width, hidden))
        self.down = nn.Parameter(torch.empty(num_experts, hidden, width))

    def activate(self, *h_eRH: Tensor) -> Tensor:
        (h,) = h_eRH
        return F.gelu(h, approximate="tanh")

    def activate_forward(self, h_eRH: tuple[Tensor, ...]) -> Tensor:
        (h,) = h_eRH
        return gelu_rows(h)

    def activate_backward(self, h_eRH: tuple[Tensor, ...], da_eRH: Tensor, gate_eR: Tensor) -> Activated:
        (h,) = h_eRH
        a, dh, dot = gelu_backward_rows(h, da_eRH, gate_eR)
        return Activated(a=a, dh=(dh,), dot_eR=dot)

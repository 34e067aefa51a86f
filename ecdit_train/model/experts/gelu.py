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

from ..feed_forward import FeedForward
from ..moe import Experts


@dataclass(frozen=True, kw_only=True)
class Gelu(ExpertsConfig):
    """Two bias-free layers with GELU between them, the same as the dense feed-forward."""

    shared_matrices: ClassVar[int] = 2

    def build(self, *, width: int, hidden: int, num_experts: int) -> GeluExperts:
        return GeluExperts(width, hidden=hidden, num_experts=num_experts)

    def build_shared(self, *, width: int, hidden: int) -> FeedForward:
        return FeedForward(width, hidden=hidden)


class GeluExperts(Experts):
    """Indexing the stacked weights by expert in a loop would allocate a full-size zero gradient for each; one
    batched product does not."""

    def __init__(self, width: int, *, hidden: int, num_experts: int) -> None:
        super().__init__(num_experts)
        self.up = nn.Parameter(torch.empty(num_experts, width, hidden))
        self.down = nn.Parameter(torch.empty(num_experts, hidden, width))

    def compute(self, x_eRD: Tensor) -> Tensor:
        h_eRH = F.gelu(torch.bmm(x_eRD, self.up), approximate="tanh")
        return torch.bmm(h_eRH, self.down)

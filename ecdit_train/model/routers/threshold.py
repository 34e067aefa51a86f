"""Threshold routing: an expert takes every token whose affinity is above one running threshold, as many as there are.

The threshold follows the value that would have given `capacity_factor` experts per token, so the compute is right on
average while single tokens, images and timesteps may take more or less: the routing that expert races use at inference.
It is the plain example of a router whose number of rows varies and which keeps a buffer.

Legend: G routing groups, S tokens of a group, D hidden width, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ecdit_train.config.rules import Checker
from ecdit_train.config.schema import RunConfig
from ecdit_train.config.slots import AffinityConfig, RouterSizes

from ..assignment import Selection
from ..router import AffinityRouter, RouterInput
from ..selecting import decided


@dataclass(frozen=True, kw_only=True)
class Threshold(AffinityConfig):
    """Each expert takes the tokens whose affinity exceeds a running threshold."""

    momentum: float
    """Share of the old threshold that an optimizer step keeps."""

    def capacity(self, *, group_tokens: int, num_experts: int) -> None:
        return None

    def check(self, run: RunConfig, check: Checker, *, key: str) -> None:
        check.share([f"{key}.momentum"], below_one=True)
        self.check_factor(run, check, key=key)

    def build(self, sizes: RouterSizes) -> ThresholdRouter:
        return ThresholdRouter(sizes, config=self)


class ThresholdRouter(AffinityRouter):
    """Gates are the affinities themselves."""

    threshold: Tensor
    """fp32 scalar."""

    def __init__(self, sizes: RouterSizes, *, config: Threshold) -> None:
        super().__init__(sizes, sees=config.sees)
        self.config = config
        self.register_buffer("threshold", torch.empty(()))

    def reset_buffers(self) -> None:
        """The affinity of a router that knows nothing."""
        self.threshold.fill_(1.0 / self.weight.shape[1])

    def forward(self, tokens: RouterInput) -> Selection:
        a_GSE = self.affinity(tokens)
        _, S, E = a_GSE.shape
        wanted = min(max(round(S * self.config.capacity_factor), 1), S * E)
        last_G = a_GSE.detach().flatten(1).topk(wanted, dim=1).values[:, -1]
        selected_GSE = decided(a_GSE.detach() > self.threshold)
        return Selection(
            selected_GSE=selected_GSE,
            gate_GSE=a_GSE,
            mean_rows=S * self.config.capacity_factor / E,
            probability_GSE=a_GSE.detach(),
            metrics={"threshold": self.threshold.clone(), "experts_per_token": selected_GSE.sum(-1).float().mean()},
            observed={"threshold": last_G.mean()},
        )

    def update_buffers(self, observed: Mapping[str, Tensor]) -> None:
        self.threshold.lerp_(observed["threshold"].to(self.threshold.dtype), 1.0 - self.config.momentum)

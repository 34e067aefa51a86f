"""DiffMoE's router (arXiv 2503.14487): expert choice over a whole microbatch in training, as many tokens as predicted in inference.

In training each expert takes the C = S * f_c / E tokens of highest affinity of a group (there: a rank's microbatch,
`moe.scope=batch`); gates are the affinities. Beside it a small network predicts from the tokens alone who will be taken by whom.
It learns from the selection and gives the rest of the network no gradient. For every expert a threshold follows the prediction of
the C-th best token.

When pictures are drawn there is no batch to compete in. Then an expert takes as many tokens as have a prediction above its
threshold, and takes those of highest affinity: the number of rows follows what is drawn.

Legend: G routing groups, S tokens of a group, D hidden width, E experts, C capacity.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecdit_train.config.rules import Checker
from ecdit_train.config.schema import RunConfig
from ecdit_train.config.slots import AffinityConfig, RouterSizes

from ..assignment import Selection, Table
from ..router import AffinityRouter, RouterInput, whole_capacity


@dataclass(frozen=True, kw_only=True)
class DiffMoE(AffinityConfig):
    """Expert choice in training; in inference as many tokens per expert as a predictor asks for."""

    predictor_weight: float
    """Weight of the predictor's loss, binary cross-entropy against the selection, summed over layers."""
    momentum: float
    """Share of the old threshold that an optimizer step keeps."""

    def capacity(self, *, group_tokens: int, num_experts: int) -> float:
        return group_tokens * self.capacity_factor / num_experts

    def sampling_capacity(self, *, group_tokens: int, num_experts: int) -> None:
        return None

    def flops_per_token(self, sizes: RouterSizes) -> float:
        """Affinities, and the predictor's two layers."""
        return 2.0 * sizes.width * (2 * sizes.num_experts + sizes.width)

    def kept_bytes_per_token(self, sizes: RouterSizes, *, compute_bytes: int) -> float:
        """As any router; of the predictor its input in fp32, the hidden layer before and after its activation, what it
        says and should say."""
        affinities = super().kept_bytes_per_token(sizes, compute_bytes=compute_bytes)
        affinities += 4.0 * sizes.width if compute_bytes < 4 else 0.0
        return affinities + 8.0 * sizes.width + 8.0 * sizes.num_experts

    def check(self, run: RunConfig, check: Checker, *, key: str) -> None:
        check.share([f"{key}.momentum"], below_one=True)
        check.at_least(0, [f"{key}.predictor_weight"])
        self.check_factor(run, check, key=key)

    def build(self, sizes: RouterSizes) -> DiffMoERouter:
        return DiffMoERouter(sizes, config=self)


class DiffMoERouter(AffinityRouter):
    threshold: Tensor
    """(E,) fp32: predictions above it ask for the expert."""

    def __init__(self, sizes: RouterSizes, *, config: DiffMoE) -> None:
        super().__init__(sizes, sees=config.sees)
        self.config = config
        self.predictor_in = nn.Linear(sizes.width, sizes.width)
        self.predictor_out = nn.Linear(sizes.width, sizes.num_experts)
        self.register_buffer("threshold", torch.empty(sizes.num_experts))

    def reset_buffers(self) -> None:
        self.threshold.zero_()

    def forward(self, tokens: RouterInput) -> Table | Selection:
        seen_GSD = self.seen(tokens)
        a_GSE = self.logits(tokens, seen_GSD=seen_GSD).softmax(-1)
        asked_GSE = self._asked(seen_GSD.detach())
        return self._competing(a_GSE, asked_GSE) if self.training else self._predicted(a_GSE, asked_GSE)

    def _asked(self, x_GSD: Tensor) -> Tensor:
        """(G, S, E) logits of an expert taking a token."""
        inner, outer = self.predictor_in, self.predictor_out
        with torch.autocast(x_GSD.device.type, enabled=False):
            h_GSD = F.silu(F.linear(x_GSD, inner.weight.to(x_GSD.dtype), inner.bias.to(x_GSD.dtype)))
            return F.linear(h_GSD, outer.weight.to(h_GSD.dtype), outer.bias.to(h_GSD.dtype))

    def _competing(self, a_GSE: Tensor, asked_GSE: Tensor) -> Table:
        """Training: C tokens each."""
        G, S, E = a_GSE.shape
        C = whole_capacity(self.config.capacity(group_tokens=S, num_experts=E), tokens=S)
        gate_EGC, index_EGC = a_GSE.permute(2, 0, 1).topk(C, dim=-1, sorted=False)
        taken_GSE = torch.zeros_like(asked_GSE).permute(2, 0, 1).scatter(2, index_EGC, 1.0).permute(1, 2, 0)
        loss = F.binary_cross_entropy_with_logits(asked_GSE, taken_GSE)
        p_GSE = asked_GSE.detach().sigmoid()
        above_GSE = p_GSE > self.threshold
        first = torch.arange(G, device=a_GSE.device)[:, None] * S
        return Table(
            index_EGC=index_EGC + first,
            gate_EGC=gate_EGC,
            probability_GSE=a_GSE.detach(),
            losses={"predictor": self.config.predictor_weight * loss},
            observed={"threshold": p_GSE.topk(C, dim=1).values[:, -1].mean(0)},
            metrics={
                "predictor_accuracy": ((p_GSE > 0.5) == taken_GSE.bool()).float().mean(),
                # What drawing would take of these tokens, against capacity_factor.
                "predicted_experts_per_token": above_GSE.sum(-1).float().mean(),
            },
        )

    def _predicted(self, a_GSE: Tensor, asked_GSE: Tensor) -> Selection:
        """Inference: as many tokens as are predicted, of highest affinity; of equal ones the earlier."""
        _, S, E = a_GSE.shape
        above_GSE = asked_GSE.sigmoid() > self.threshold
        order_GSE = a_GSE.detach().argsort(dim=1, descending=True, stable=True)
        place_GSE = torch.empty_like(order_GSE).scatter(
            1, order_GSE, torch.arange(S, device=a_GSE.device)[:, None].expand_as(order_GSE)
        )
        return Selection(
            selected_GSE=place_GSE < above_GSE.sum(1, keepdim=True),
            gate_GSE=a_GSE,
            mean_rows=S * self.config.capacity_factor / E,
            probability_GSE=a_GSE.detach(),
            metrics={"predicted_experts_per_token": above_GSE.sum(-1).float().mean()},
        )

    def update_buffers(self, observed: Mapping[str, Tensor]) -> None:
        self.threshold.lerp_(observed["threshold"].to(self.threshold.dtype), 1.0 - self.config.momentum)

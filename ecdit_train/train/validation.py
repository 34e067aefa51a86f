"""The loss on images that are never trained on, always with the same draws: a number that only the weights can change.

The images pass in the order of the data set, in global batches and microbatches cut as in training, so that the same images share
a routing group on every layout.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ecdit_train.diffusion.flow import Flow
from ecdit_train.diffusion.microbatch import split
from ecdit_train.observe.metrics import Sums, summed
from ecdit_train.observe.routing_drift import drift_record, drift_sums, selections
from ecdit_train.observe.timesteps import loss_by_timestep, loss_sums
from ecdit_train.parallel.context import ParallelContext

from .contracts import Batches
from .state import TrainState
from .step import forward

FIRST_POSITION = 1 << 60
"""Held-out images draw at positions that no training stream reaches."""


@dataclass(kw_only=True)
class Validation:
    """Measures one model. `flow` is the training's, but drops no caption."""

    parallel: ParallelContext
    state: TrainState
    flow: Flow
    batches: Batches
    """The held-out images, global batch by global batch."""
    num_batches: int
    microbatch: int
    group_tokens: int
    layers: tuple[int, ...]
    """Numbers of the sparse blocks."""
    _selected: list[list[Tensor]] = field(default_factory=list)
    """Of the last measurement of this life."""

    @classmethod
    def of(cls, flow: Flow, **parts: Any) -> Validation:
        return cls(flow=replace(flow, config=replace(flow.config, caption_drop=0.0)), **parts)

    def measure(self) -> dict[str, float]:
        """`loss` with the weights as they are, `loss_ema` with their average where one is kept, both by timestep too
        (`loss_t{b}`), and how far the routing of a fixed batch moved since the last measurement (`selection_drift`).
        Collective; the same numbers on every rank and every layout."""
        before = self.batches.substituted()
        sums, now = self._pass(nullcontext())
        sums["substituted"] = torch.tensor([float(self.batches.substituted() - before)])
        if self._selected:
            sums |= drift_sums(self._selected, now, layers=self.layers)
        self._selected = now
        total = summed(sums, device=self.parallel.runtime.device, all_reduce=self.parallel.reduce)
        measured = {
            **_losses(total, "loss"),
            "substituted": float(total["substituted"][0]),
            **drift_record(total, layers=self.layers),
        }
        if self.state.ema is not None:
            sums, _ = self._pass(self.state.ema.swapped_in())
            measured |= _losses(
                summed(sums, device=self.parallel.runtime.device, all_reduce=self.parallel.reduce), "loss_ema"
            )
        return measured

    @torch.no_grad()
    def _pass(self, weights: AbstractContextManager[Any]) -> tuple[dict[str, Tensor], list[list[Tensor]]]:
        """Sums of the losses of all held-out images of this rank, and who took what of the first global batch."""
        start = self.batches.state_dict() | {"step": 0}
        self.batches.load_state_dict(start)
        sums: dict[str, Tensor] = {}
        selected: list[list[Tensor]] = []
        with weights:
            for number in range(self.num_batches):
                batch = self.batches.encode(self.batches.fetch())
                batch = replace(batch, position_B=batch.position_B + FIRST_POSITION)
                for micro in split(batch, size=self.microbatch):
                    seen = forward(self.parallel.model, micro, flow=self.flow, group_tokens=self.group_tokens).seen
                    for name, value in loss_sums(seen.error_B, t_B=seen.t_B).items():
                        sums[name] = sums[name] + value if name in sums else value
                    if number == 0 and seen.assignments:
                        selected.append(selections(seen.assignments))
            self.parallel.reshard()
        return sums, selected

    def close(self) -> None:
        self.batches.close()


def _losses(sums: Sums, name: str) -> dict[str, float]:
    """The loss over all images and by timestep."""
    by_timestep = loss_by_timestep(sums, loss=name, images=None)
    return {name: float(sums["diffusion/loss"].sum() / sums["diffusion/images"].sum()), **by_timestep}

"""The loss on images that are never trained on, always with the same draws: a number that only the weights can change.

The images pass in the order of the data set, in global batches and microbatches cut as in training, so that the same images share
a routing group on every layout.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from ecdit_train.diffusion.flow import Flow
from ecdit_train.diffusion.microbatch import split
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

    @classmethod
    def of(cls, flow: Flow, **parts: Any) -> Validation:
        return cls(flow=replace(flow, config=replace(flow.config, caption_drop=0.0)), **parts)

    def measure(self) -> dict[str, float]:
        """`loss` with the weights as they are, `loss_ema` with their average where one is kept. Collective."""
        before = self.batches.substituted()
        measured = {"loss": self._loss(nullcontext())}
        replaced = torch.tensor([float(self.batches.substituted() - before)], device=self.parallel.runtime.device)
        measured["substituted"] = float(self.parallel.reduce(replaced, op="sum"))
        if self.state.ema is not None:
            measured["loss_ema"] = self._loss(self.state.ema.swapped_in())
        return measured

    @torch.no_grad()
    def _loss(self, weights: AbstractContextManager[Any]) -> float:
        start = self.batches.state_dict() | {"step": 0}
        self.batches.load_state_dict(start)
        losses = []
        with weights:
            for _ in range(self.num_batches):
                batch = self.batches.encode(self.batches.fetch())
                batch = replace(batch, position_B=batch.position_B + FIRST_POSITION)
                for micro in split(batch, size=self.microbatch):
                    out = forward(self.parallel.model, micro, flow=self.flow, group_tokens=self.group_tokens)
                    losses.append(out.loss)
            self.parallel.reshard()
        return float(self.parallel.reduce(torch.stack(losses).mean().reshape(1), op="mean"))

    def close(self) -> None:
        self.batches.close()

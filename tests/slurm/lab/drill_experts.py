"""Experts for drills: those of the paper, but a step takes the same while on every machine, and may be fatal.

Sleeping costs other processes nothing, so a busy machine does not stretch it, and a fast one leaves time for an event.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass

from torch import Tensor

from ecdit_train.model.experts.gelu import Gelu, GeluExperts


@dataclass(frozen=True, kw_only=True)
class Drill(Gelu):
    pause: float
    """Seconds that each pass takes longer."""
    fatal: bool
    """Whether the first pass on rank 1 is the end of it."""

    def build(self, *, width: int, hidden: int, num_experts: int) -> DrillExperts:
        return DrillExperts(self, width=width, hidden=hidden, num_experts=num_experts)


class DrillExperts(GeluExperts):
    def __init__(self, config: Drill, *, width: int, hidden: int, num_experts: int) -> None:
        super().__init__(width, hidden=hidden, num_experts=num_experts)
        self.config = config

    def compute(self, x_eRD: Tensor) -> Tensor:
        if self.config.fatal and os.environ.get("RANK") == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.config.pause)
        return super().compute(x_eRD)

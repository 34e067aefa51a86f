"""Whether an update is made, decided on the device: the host learns of it a step later.

An update is refused where a number of it is not finite on any rank, where its loss is a spike and the policy leaves spikes out,
and after another that was refused, until the host says how to go on. The last rule lets the host be a step ahead: what it
assumed of an update (its number, hence its learning rate) is true of every update that is made.

Legend: W losses remembered.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ecdit_train.config.life import HealthConfig
from ecdit_train.parallel.context import ParallelContext

LEAST = 16
"""Losses that a median needs before anything is called a spike."""

SCALE = 1.4826
"""Median absolute deviation to standard deviation, for normal values."""


class DeviceGuard:
    """The judge of every step that may not wait; `train.guard.Guard` reads its flags and says what becomes of the run."""

    def __init__(self, config: HealthConfig) -> None:
        self._config = config
        self._losses_W: Tensor | None = None
        self._halted: Tensor | None = None
        self._count, self._kept = 0, list[float]()

    def go_on(self, losses: list[float]) -> None:
        """From here on updates are made again; `losses`: of the last updates that were made, oldest first."""
        self._kept, self._count, self._losses_W = list(losses), len(losses), None

    @torch.no_grad()
    def judge(self, *, loss: Tensor, finite: Tensor, parallel: ParallelContext) -> tuple[Tensor, Tensor]:
        """`loss` and `finite` (whether all numbers are), 0-dim, of this rank. Returns `found_inf` (0-dim, 1: refused), and (2,):
        whether any rank saw a number that is not finite, and whether any saw a spike. One small collective, on the device."""
        if self._losses_W is None or self._halted is None:
            self._begin(loss.device)
        assert self._losses_W is not None
        assert self._halted is not None
        spike = torch.zeros_like(finite) if self._config.spike == "ignore" else self._is_spike(loss)
        flags = parallel.any_rank(torch.stack([~finite, spike & finite]).float())
        left_out = flags if self._config.spike in ("skip", "roll_back") else flags[:1]
        refuse = torch.maximum(left_out.max(), self._halted)
        self._losses_W[self._count % self._config.spike_window] = loss  # what is refused is forgotten by `go_on`
        self._count += 1
        self._halted = refuse
        return refuse, flags

    def _begin(self, device: torch.device) -> None:
        W, kept = self._config.spike_window, self._kept[-self._config.spike_window :]
        losses_W = torch.full((W,), torch.inf, dtype=torch.float64)
        for n, loss in enumerate(kept, self._count - len(kept)):
            losses_W[n % W] = loss
        self._losses_W = losses_W.to(device)
        self._halted = torch.zeros((), device=device)

    def _is_spike(self, loss: Tensor) -> Tensor:
        """Far above the median of the last losses, in fp64 as `statistics.median` would have it. Places without a loss hold inf
        and are sorted to the end."""
        assert self._losses_W is not None
        n = min(self._count, self._config.spike_window)
        if n < LEAST:
            return torch.zeros((), dtype=torch.bool, device=loss.device)
        median = _median(self._losses_W, n)
        deviation = SCALE * _median((self._losses_W - median).abs(), n)
        return loss.double() > median + self._config.spike_deviations * deviation


def _median(values_W: Tensor, n: int) -> Tensor:
    """Of the n smallest."""
    ordered = values_W.sort().values
    return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2 if n % 2 == 0 else ordered[n // 2]


class Reading:
    """A few numbers on their way from the device to the host, who goes on meanwhile."""

    def __init__(self, values: Tensor) -> None:
        self._values, self._there = values, None
        if values.device.type == "cuda":
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._there = torch.cuda.Event()
            self._there.record()

    def get(self) -> list[float]:
        """Waits until the device has come to them, not for what it was asked afterwards."""
        if self._there is not None:
            self._there.synchronize()
        return self._values.tolist()

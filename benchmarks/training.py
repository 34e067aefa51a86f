"""A run's step without a run: random latents and text in place of data, a fixed learning rate, and nobody who watches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ecdit_train.config.schema import RunConfig
from ecdit_train.diffusion.flow import Flow
from ecdit_train.diffusion.microbatch import Microbatch
from ecdit_train.parallel.context import spread
from ecdit_train.parallel.runtime import Runtime
from ecdit_train.train.device_guard import DeviceGuard
from ecdit_train.train.state import TrainState
from ecdit_train.train.step import Issued, Seen, train_step, unwatched


def microbatch(
    config: RunConfig,
    *,
    images: int | None = None,
    first: int = 0,
    generator: torch.Generator | None = None,
    device: str = "cpu",
) -> Microbatch:
    """`images` (a microbatch of the run's, if not said) from position `first` on."""
    B, side, text = images or config.train.microbatch, config.latent_side, config.encoders.text
    latents_BCHW = torch.randn(B, config.encoders.image.channels, side, side, generator=generator, device=device)
    return Microbatch(
        position_B=torch.arange(first, first + B, device=device),
        latents_BCHW=latents_BCHW,
        features_BLX=torch.randn(B, text.max_tokens, text.width, generator=generator, device=device),
        mask_BL=torch.ones(B, text.max_tokens, dtype=torch.bool, device=device),
    )


def global_batch(config: RunConfig) -> list[Microbatch]:
    """What one process trains on in a step, the same in every call."""
    generator = torch.Generator().manual_seed(0)
    return [
        microbatch(config, first=first, generator=generator)
        for first in range(0, config.train.global_batch, config.train.microbatch)
    ]


class Training:
    """What trains is what a run trains with, the guard included: `train_step`, and what it needs besides a batch."""

    def __init__(self, config: RunConfig, runtime: Runtime, *, lr: float) -> None:
        self.config, self.lr = config, lr
        self.parallel = spread(config, runtime)
        self.state = TrainState.fresh(self.parallel.model, config.optim, sharding=self.parallel.sharding)
        self.guard = DeviceGuard(config.health)
        self.flow = Flow(config=config.diffusion, seed=0, patch=config.model.patch, num_kept=config.tokens_per_image)

    def step(self, microbatches: list[Microbatch], *, watch: Callable[[Sequence[Seen]], None] = unwatched) -> Issued:
        """Ask the device for a step on this rank's microbatches."""
        c = self.config
        issued = train_step(
            microbatches, parallel=self.parallel, state=self.state, guard=self.guard, lr=self.lr,
            max_norm=c.optim.clip_norm, flow=self.flow, group_tokens=c.group_tokens, watch=watch,
        )  # fmt: skip
        self.state.step += 1
        return issued

"""From noise to latents with classifier-free guidance; the integrators are in `samplers/`.

Legend: B images, C channels, H W latent height and width.

Guidance runs both halves in one batch: the network gets them one after the other, so that captioned and null pictures never
share a routing group: under scope `image` and `group` because a half is whole groups, under `batch` because the group is a half
(in training, pictures whose caption was dropped are in the groups of those with one). Routers that let whole microbatches compete
in training decide by thresholds here, token by token.

Noise is keyed by (seed, prompt, repetition): same prompt and seed, same picture, whatever else is drawn.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from ecdit_train import keyed
from ecdit_train.config.schema import SampleConfig
from ecdit_train.keyed import Purpose

from .flow import SAMPLE_FLOOR, as_velocity

Network = Callable[[Tensor, float, Tensor], Tensor]
"""(x_t (B, C, H, W), t, the same as t (B,)) -> raw prediction (B, C, H, W) fp32; see `halves` for the rows."""


def halves(config: SampleConfig, *, pictures: int, device: torch.device | str) -> Tensor:
    """(B,) bool, a row that the network sees each: the captioned pictures, and with guidance the same ones again,
    their caption dropped (True)."""
    rows = 2 * pictures if config.guidance != 1.0 else pictures
    return torch.arange(rows, device=device) >= pictures


def prompt_positions(prompts: Sequence[str]) -> Tensor:
    """A key for each picture: the prompt's CRC-32 and how often it was asked for before. (B,) int64."""
    seen: dict[str, int] = {}
    positions = []
    for prompt in prompts:
        positions.append((zlib.crc32(prompt.encode()) << 16) + seen.get(prompt, 0))
        seen[prompt] = seen.get(prompt, 0) + 1
    return torch.tensor(positions, dtype=torch.int64)


See = Callable[[float, Tensor], None]
"""Called at every evaluation with t and the latents (B, C, H, W) that would come out if the rest of the way were straight."""


@torch.no_grad()
def sample(
    network: Network,
    *,
    position_B: Tensor,
    shape: tuple[int, int, int],
    config: SampleConfig,
    prediction: Literal["velocity", "data"],
    see: See | None = None,
) -> Tensor:
    """Latents (B, C, H, W) fp32, one for each position, on its device. Nothing here waits for the device.

    With guidance the network sees 2 B rows, first the B captioned ones, then the B whose caption is dropped:
    v = v_null + g (v_caption - v_null).
    """
    B, device = position_B.shape[0], position_B.device
    guided = config.guidance != 1.0
    rows = 2 * B if guided else B

    def velocity(x_BCHW: Tensor, t: float) -> Tensor:
        x = torch.cat([x_BCHW, x_BCHW]) if guided else x_BCHW
        t_B = torch.full((rows,), t, device=device)
        v = as_velocity(network(x, t, t_B), x, t_B, prediction=prediction, floor=SAMPLE_FLOOR)
        if guided:
            captioned, null = v.chunk(2)
            v = null + config.guidance * (captioned - null)
        if see is not None:
            see(t, x_BCHW + (1 - t) * v)
        return v

    noise = keyed.normal(config.seed, Purpose.SAMPLE_NOISE, position_B, shape=shape)
    return config.sampler.integrate(velocity, noise, times=config.sampler.times(config.steps))

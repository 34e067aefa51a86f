"""Ten equal parts of the timesteps, 0 (noise) to 1 (data), and the training loss in each.

Legend: B images, T parts of the timesteps.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .metrics import Sums

BINS = 10


def timestep_bin(t_B: Tensor) -> Tensor:
    """Which part each image is in, int64: part b is [b/10, (b+1)/10), the last one with its end."""
    return (t_B * BINS).to(torch.int64).clamp(0, BINS - 1)


def one_hot(bin_N: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """(T, N). Sums by part are products with it, in a fixed order on every device; nothing waits for the device."""
    return (torch.arange(BINS, device=bin_N.device)[:, None] == bin_N).to(dtype)


def loss_sums(error_B: Tensor, *, t_B: Tensor) -> dict[str, Tensor]:
    """Sums over images, to be added up over microbatches, steps and ranks. `error_B`: each image's own loss."""
    part_B = timestep_bin(t_B)
    # Picked, not multiplied by 0: an image that is not finite stays in its own part.
    error_TB = torch.where(one_hot(part_B, torch.bool), error_B.detach().to(torch.float64), 0.0)
    return {"diffusion/images": one_hot(part_B).sum(1), "diffusion/loss": error_TB.sum(1)}


def loss_by_timestep(
    sums: Sums, *, loss: str = "diffusion/loss", images: str | None = "diffusion/images"
) -> Mapping[str, float]:
    """`LOSS_t{b}` and `IMAGES_t{b}` of what `loss_sums` gathered; a part without an image has no loss.
    `images=None`: without the counts."""
    if "diffusion/loss" not in sums:
        return {}
    record: dict[str, float] = {}
    for b, (total, count) in enumerate(zip(sums["diffusion/loss"], sums["diffusion/images"], strict=True)):
        if images is not None:
            record[f"{images}_t{b}"] = float(count)
        if count:
            record[f"{loss}_t{b}"] = float(total / count)
    return record

"""Rectified flow: x_t = t x + (1 - t) eps, v = x - eps. t = 0 is noise, t = 1 is data; sampling integrates dx = v dt
from 0 to 1.

The paper's equation for t is the inverse of the logit-normal that it names: we draw u ~ N(mu, sigma) and take
t = sigmoid(u). Its target is written x_1 - x_0 with either end called noise; the convention above is the one
that its x_t implies.

Legend: B images, C channels, H W latent height and width, N patches, K kept patches, P values of a patch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ecdit_train import keyed
from ecdit_train.config.schema import DiffusionConfig
from ecdit_train.keyed import Purpose

TRAIN_FLOOR = 0.05
"""Smallest 1 - t by which a data prediction is divided in the loss: bounds its weight at 1 / 0.05^2 (Li & He 2025)."""
SAMPLE_FLOOR = 1e-3


def interpolate(x: Tensor, eps: Tensor, t_B: Tensor) -> Tensor:
    """x_t on the straight path from noise to data."""
    t = t_B.view(-1, *[1] * (x.dim() - 1))
    return t * x + (1.0 - t) * eps


def as_velocity(
    raw: Tensor, x_t: Tensor, t_B: Tensor, *, prediction: Literal["velocity", "data"], floor: float
) -> Tensor:
    """What the network says, as a velocity; the one place where a data
    prediction is converted: v = (x - x_t) / (1 - t)."""
    if prediction == "velocity":
        return raw
    return (raw - x_t) / (1.0 - t_B).clamp_min(floor).view(-1, *[1] * (x_t.dim() - 1))


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Every random number that a training step needs for some samples."""

    eps_BCHW: Tensor
    t_B: Tensor
    keep_BK: Tensor | None
    """Patches kept, ascending; None when nothing is masked."""
    drop_B: Tensor
    """Captions replaced by the null text."""


@dataclass(frozen=True, kw_only=True)
class Flow:
    """Draws of a training step and its loss. Every draw is a function of (seed, purpose, sample position)."""

    config: DiffusionConfig
    seed: int
    patch: int
    """Side of a patch in latent pixels."""
    num_kept: int
    """K, of every image, whatever its aspect: what follows the mask has one shape."""

    def draw(self, position_B: Tensor, *, shape: tuple[int, int, int]) -> Draws:
        """position: global positions of the samples in the training stream, int64; shape: (C, H, W), with K patches or more."""
        c, seed = self.config, self.seed
        num_patches = (shape[1] // self.patch) * (shape[2] // self.patch)
        assert num_patches >= self.num_kept, (
            f"{num_patches} patches of a latent {shape}; {self.num_kept} are to be kept"
        )
        u = keyed.normal(seed, Purpose.TIMESTEP, position_B, shape=(1,))[:, 0]
        keep = None
        if self.num_kept < num_patches:
            keep = keyed.subset(seed, Purpose.PATCH_MASK, position_B, total=num_patches, keep=self.num_kept)
        return Draws(
            eps_BCHW=keyed.normal(seed, Purpose.NOISE, position_B, shape=shape),
            t_B=torch.sigmoid(c.timestep_mean + c.timestep_std * u),
            keep_BK=keep,
            drop_B=keyed.uniform(seed, Purpose.CAPTION_DROP, position_B, num=1)[:, 0] < c.caption_drop,
        )

    def loss(self, raw_BKP: Tensor, *, x_BKP: Tensor, eps_BKP: Tensor, t_B: Tensor) -> Tensor:
        """Mean squared velocity error over the kept patches (paper eq. 1), a scalar in fp32.

        A data prediction is held against the velocity too, so both predictions minimise one loss; where 1 - t is under
        the floor, guess and truth are scaled alike.
        """
        if self.config.prediction == "velocity":
            return (raw_BKP.float() - (x_BKP - eps_BKP)).square().mean()
        weight_B = 1.0 / (1.0 - t_B).clamp_min(TRAIN_FLOOR).square()
        return (weight_B[:, None, None] * (raw_BKP.float() - x_BKP).square()).mean()

    @torch.no_grad()
    def errors(self, raw_BKP: Tensor, *, x_BKP: Tensor, eps_BKP: Tensor, t_B: Tensor) -> Tensor:
        """(B,) fp32: what `loss` is the mean of, image by image; for the logs, with a pass of its own over the prediction, so that
        the loss keeps its bits."""
        if self.config.prediction == "velocity":
            return (raw_BKP.float() - (x_BKP - eps_BKP)).square().mean((1, 2)).float()
        weight_B = 1.0 / (1.0 - t_B).clamp_min(TRAIN_FLOOR).square()
        return (weight_B * (raw_BKP.float() - x_BKP).square().mean((1, 2))).float()

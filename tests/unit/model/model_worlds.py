"""Small networks for the tests of this folder, in fp64 and with every zero-initialised part made random."""

from __future__ import annotations

import torch
from moe_configs import moe_config
from plain_configs import model_config
from torch import Tensor

from benchmarks.layers import fill_zeros
from ecdit_train.model.dit import DiT
from ecdit_train.model.embed import Text
from ecdit_train.model.init import initialise

CHANNELS, SIDE, PATCH, PATCHES, TEXT_FEATURES, TEXT_TOKENS = 3, 8, 2, 16, 24, 7


def fresh(*, router: str = "expert_choice", **changes: object) -> DiT:
    """As initialised: AdaLN-Zero."""
    dit = DiT(model_config(**changes), moe_config(router), channels=CHANNELS, text_features=TEXT_FEATURES).double()
    initialise(dit, seed=0)
    return dit


def lively(*, router: str = "expert_choice", **changes: object) -> DiT:
    """Everything has an effect."""
    dit = fresh(router=router, **changes)
    fill_zeros(dit, std=0.1)
    return dit


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def latents(images: int = 4, *, seed: int = 0) -> Tensor:
    return random(images, CHANNELS, SIDE, SIDE, seed=seed)


def text(images: int = 4, *, seed: int = 0, drop: tuple[int, ...] = ()) -> Text:
    """Captions of different lengths."""
    lengths = torch.arange(images) % TEXT_TOKENS + 1
    drop_B = torch.zeros(images, dtype=torch.bool)
    drop_B[list(drop)] = True
    return Text(
        features_BLX=random(images, TEXT_TOKENS, TEXT_FEATURES, seed=seed + 100),
        mask_BL=torch.arange(TEXT_TOKENS) < lengths[:, None],
        drop_B=drop_B,
    )


def times(images: int = 4) -> Tensor:
    return torch.linspace(0.1, 0.9, images)

"""Pictures from a trained model, with the routing that made them.

Legend: n pictures, S pixels per side, T timesteps looked at, L sparse layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ecdit_train.config.schema import RunConfig, SampleConfig
from ecdit_train.diffusion.encoders import ImageCodec, TextEncoder
from ecdit_train.diffusion.sampler import prompt_positions, sample
from ecdit_train.model.dit import DiT, Prediction
from ecdit_train.model.embed import Text, unpatchify
from ecdit_train.observe.routing import RoutingMaps, count_maps, sparse_layers

WATCHED_TIMESTEPS = 5
"""Timesteps, evenly spread over the sampler's steps, at which routing is recorded."""


Watcher = Callable[[float, Prediction], None]
"""Called with t and what the network said, at every evaluation."""


def sample_latents(
    model: DiT,
    *,
    text: tuple[Tensor, Tensor],
    position_B: Tensor,
    shape: tuple[int, int, int],
    config: SampleConfig,
    prediction: Literal["velocity", "data"],
    pool: int,
    watch: Watcher | None = None,
) -> Tensor:
    """Latents (B, C, H, W) for text features (B, L, X) with their mask (B, L). B * patches must be whole pools.

    A picture depends on every picture in its pool: `pool` = patches of one image keeps them independent, the paper's
    512 tokens (two images) are one override of the sample section.
    """
    features, mask = text
    side = shape[1] // model.patch
    # Otherwise the captioned and the null half of guidance would share a pool.
    assert features.shape[0] * side * side % pool == 0, f"{features.shape[0]} images are not whole pools of {pool}"

    def network(x_BCHW: Tensor, t_B: Tensor, drop_B: Tensor) -> Tensor:
        halves = x_BCHW.shape[0] // features.shape[0]
        both = Text(features_BLX=features.repeat(halves, 1, 1), mask_BL=mask.repeat(halves, 1), drop_B=drop_B)
        out = model(x_BCHW, t_B=t_B, text=both, keep_BK=None, pool=pool)
        if watch is not None:
            watch(float(t_B[0]), out)
        return unpatchify(out.patches_BKP.float(), patch=model.patch, side=side)

    return sample(network, position_B=position_B.to(features.device), shape=shape, config=config, prediction=prediction)


@dataclass(frozen=True, kw_only=True)
class Pictures:
    images: np.ndarray
    """uint8 (n, S, S, 3), in the order of the prompts."""
    prompts: tuple[str, ...]
    maps: RoutingMaps | None
    """None for a dense model."""


@dataclass(frozen=True, kw_only=True)
class Painter:
    """Draws prompts with the weights that the model holds now.

    On several ranks every rank must call it with the same words: each data-parallel rank draws its share, `gather` puts
    the shares together.
    """

    model: DiT
    text: TextEncoder
    codec: ImageCodec
    config: RunConfig
    device: torch.device
    dp_rank: int = 0
    dp_size: int = 1
    gather: Callable[[Tensor], Tensor] = lambda x: x
    """Concatenates equal shares of all data-parallel ranks on dim 0."""

    def pool(self, how: SampleConfig, *, batch: int) -> int:
        """Tokens of a routing pool; an image's own where nothing is routed."""
        n = self.config.patches_per_image
        if self.config.moe.router == "dense":
            return n
        return {"image": n, "group": how.group_size, "batch": batch * n}[how.scope]

    def draw(self, prompts: Sequence[str], *, how: SampleConfig, step: int, batch: int = 64) -> Pictures:
        """At most `batch` pictures are in flight on a rank, rounded down to whole pools but one at least. Missing places
        of a pool or of a rank are filled with copies of the last prompt, which are thrown away."""
        c, n = self.config, len(prompts)
        images_per_pool = self.pool(how, batch=1) // c.patches_per_image
        batch = max(1, batch // images_per_pool) * images_per_pool
        position = prompt_positions(prompts)
        share = -(-n // (self.dp_size * images_per_pool)) * images_per_pool
        mine = [min(i, n - 1) for i in range(self.dp_rank * share, (self.dp_rank + 1) * share)]
        images, counts = [], []
        was_training = self.model.training
        self.model.eval()
        for start in range(0, share, batch):
            part = mine[start : start + batch]
            recorder = _Recorder(how, side=c.latent_side // c.model.patch, batch=len(part))
            latents = sample_latents(
                self.model,
                text=self.text.encode([prompts[i] for i in part]),
                position_B=position[part],
                shape=(c.encoders.image.channels, c.latent_side, c.latent_side),
                config=how,
                prediction=c.diffusion.prediction,
                pool=self.pool(how, batch=len(part)),
                watch=recorder,
            )
            images.append(self.codec.decode(latents))
            counts.append(recorder.counts())
        self.model.train(was_training)
        pixels = self.gather(torch.cat(images))[:n].cpu().numpy()
        maps = None
        if counts[0] is not None:
            both = self.gather(torch.cat([x for x in counts if x is not None]))[:n].cpu().numpy()
            maps = RoutingMaps(
                counts=both.transpose(1, 2, 0, 3, 4),
                timesteps=np.array(_watched(how), dtype=np.float32),
                layers=sparse_layers(both.shape[2]),
                prompts=tuple(prompts),
                images=pixels,
                scope=how.scope,
                group_size=how.group_size,
                experts=c.moe.experts,
                capacity_factor=c.moe.capacity_factor,
                step=step,
            )
        return Pictures(images=pixels, prompts=tuple(prompts), maps=maps)


def _watched(how: SampleConfig) -> list[float]:
    """The timesteps recorded: evenly spread over the steps, the first and the last among them."""
    steps = np.unique(np.linspace(0, how.steps - 1, min(WATCHED_TIMESTEPS, how.steps)).round().astype(int))
    return [int(s) / how.steps for s in steps]


class _Recorder:
    """Keeps the number of experts per patch of the conditional half, at the watched timesteps.

    Heun evaluates a t twice: first at its predictor's guess, then at the state itself. The later one is kept.
    """

    def __init__(self, how: SampleConfig, *, side: int, batch: int) -> None:
        self._wanted, self._side, self._batch = _watched(how), side, batch
        self._seen: dict[int, Tensor] = {}

    def __call__(self, t: float, prediction: Prediction) -> None:
        # t comes back from the device as fp32, hence the tolerance.
        place = next((i for i, wanted in enumerate(self._wanted) if abs(t - wanted) < 1e-6), None)
        if place is None or not prediction.assignments:
            return
        rows = prediction.patches_BKP.shape[0]
        counts = count_maps(prediction.assignments, batch=rows, side=self._side)
        self._seen[place] = counts[:, : self._batch].to(torch.uint8)

    def counts(self) -> Tensor | None:
        """(B, T, L, side, side) uint8, or None for a dense model."""
        if not self._seen:
            return None
        return torch.stack([self._seen[i] for i in range(len(self._wanted))]).permute(2, 0, 1, 3, 4).contiguous()

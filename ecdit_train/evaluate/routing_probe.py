"""What a router does with pictures whose content is known: the same pictures and noise at several timesteps, one pass each.

Legend: n pictures, S pixels per side, T timesteps, L sparse layers, K patches of a picture, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ecdit_train import keyed
from ecdit_train.diffusion.flow import as_velocity, interpolate
from ecdit_train.keyed import Purpose
from ecdit_train.model.assignment import Assignment, chosen, experts_per_token
from ecdit_train.model.dit import Prediction
from ecdit_train.model.embed import Text, unpatchify
from ecdit_train.observe.routing import combination_usage, max_violation

from .pictures import SamplePipeline

TIMESTEPS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Where routing is looked at; t = 0 is noise, t = 1 is data."""
FIXED = 0.5
"""Timestep of the pictures that are shown while another timestep is told."""
NOISE_SEED = 20_000
"""Of the pictures' noise: the same for every model that is probed."""


@dataclass(frozen=True, kw_only=True)
class KnownPictures:
    """Pictures, their captions, and which patches show an object."""

    images: np.ndarray
    """uint8 (n, S, S, 3)."""
    captions: tuple[str, ...]
    on_object: np.ndarray
    """bool (n, K)."""


@dataclass(frozen=True, kw_only=True)
class RoutingProbe:
    """All numbers are means over the pictures; by layer they are in the order of the sparse blocks."""

    loss: tuple[float, ...]
    """(T,): mean squared velocity error without guidance."""
    on_object: tuple[tuple[float, ...], ...]
    """(T, L): experts per patch that shows an object."""
    on_background: tuple[tuple[float, ...], ...]
    """(T, L): experts per patch that shows none."""
    timestep_sensitivity: tuple[float, ...]
    """(L,): share of the variance of affinities that the timestep alone makes: the network is given the same
    noisy pictures (those of `FIXED`) and told another timestep. 0 is a router that does not see the time, 1 one
    that sees nothing else."""
    max_violation: tuple[float, ...]
    """(L,): mean over timesteps, see `observe.routing.max_violation`."""
    combination_usage: tuple[float, ...]
    """(L,)."""

    @property
    def experts_on_object(self) -> float | None:
        """Mean over timesteps and layers; None without experts."""
        return float(np.mean(self.on_object)) if self.max_violation else None

    @property
    def experts_on_background(self) -> float | None:
        return float(np.mean(self.on_background)) if self.max_violation else None


@dataclass(frozen=True, kw_only=True)
class Look:
    """One pass over the pictures at one timestep. Device tensors."""

    t: float
    prediction: Prediction
    told: Prediction | None
    """The pictures of `FIXED` told this timestep; None unless asked for."""
    x_t: Tensor
    velocity: Tensor
    """(n, C, H, W): what the network should say."""


@torch.no_grad()
def looks(
    pipeline: SamplePipeline,
    known: KnownPictures,
    *,
    timesteps: Sequence[float] = TIMESTEPS,
    noise_seed: int = NOISE_SEED,
    told: bool = False,
) -> Iterator[Look]:
    """The known pictures with the same noise at each timestep. Every rank must call it with the same pictures; each looks at all of
    them. Routes as drawing does (`sample.scope`), so they must be whole routing groups."""
    c, model, device = pipeline.config, pipeline.parallel.model, pipeline.parallel.runtime.device
    n = len(known.images)
    latents = pipeline.codec.encode(torch.from_numpy(known.images).to(device))
    features, mask = pipeline.text.encode(known.captions)
    text = Text(features_BLX=features, mask_BL=mask, drop_B=torch.zeros(n, dtype=torch.bool, device=device))
    eps = keyed.normal(noise_seed, Purpose.NOISE, torch.arange(n, device=device), shape=tuple(latents.shape[1:]))
    group_tokens = pipeline.group_tokens(c.sample, batch=n)
    assert n * c.patches_per_image % group_tokens == 0, f"{n} pictures are not whole groups of {group_tokens} tokens"
    was_training = model.training
    model.eval()

    def run(x_t: Tensor, t_B: Tensor) -> Prediction:
        return model(x_t, t_B=t_B, text=text, keep_BK=None, group_tokens=group_tokens)

    half = interpolate(latents, eps, torch.full((n,), FIXED, device=device))
    try:
        for t in timesteps:
            t_B = torch.full((n,), t, device=device)
            x_t = interpolate(latents, eps, t_B)
            again = run(half, t_B) if told else None
            yield Look(t=t, told=again, prediction=run(x_t, t_B), x_t=x_t, velocity=latents - eps)
    finally:
        model.train(was_training)


@torch.no_grad()
def probe(pipeline: SamplePipeline, known: KnownPictures, *, timesteps: Sequence[float] = TIMESTEPS) -> RoutingProbe:
    """Collective, as `looks`."""
    c, model, device = pipeline.config, pipeline.parallel.model, pipeline.parallel.runtime.device
    on_object_N = torch.from_numpy(known.on_object).to(device).flatten()
    losses, objects, backgrounds, violations, usages = [], [], [], [], []
    spread = _Spread()
    for look in looks(pipeline, known, timesteps=timesteps, told=True):
        assert look.told is not None
        spread.add(look.told.assignments)
        out, t_B = look.prediction, torch.full((len(known.images),), look.t, device=device)
        raw = unpatchify(out.patches_BKP.float(), patch=model.patch, side=c.latent_side // c.model.patch)
        velocity = as_velocity(raw, look.x_t, t_B, prediction=c.diffusion.prediction, floor=1e-3)
        losses.append((velocity - look.velocity).square().mean().item())
        counts = [experts_per_token(a).flatten().float() for a in out.assignments]
        objects.append(tuple(x[on_object_N].mean().item() for x in counts))
        backgrounds.append(tuple(x[~on_object_N].mean().item() for x in counts))
        who = [chosen(a) for a in out.assignments]
        violations.append([max_violation(x).item() for x in who])
        usages.append([combination_usage(x).item() for x in who])
    return RoutingProbe(
        loss=tuple(losses),
        on_object=tuple(objects),
        on_background=tuple(backgrounds),
        timestep_sensitivity=spread.shares(),
        max_violation=tuple(np.mean(violations, axis=0).tolist()),
        combination_usage=tuple(np.mean(usages, axis=0).tolist()),
    )


class _Spread:
    """Variance of each token's affinities over timesteps, and of all affinities, layer by layer."""

    def __init__(self) -> None:
        self._seen: list[list[Tensor]] = []

    def add(self, assignments: Sequence[Assignment]) -> None:
        self._seen.append([a.probability_GSE.flatten(0, 1).double() for a in assignments])

    def shares(self) -> tuple[float, ...]:
        """Of each layer, summed over experts: mean variance of a token over timesteps / variance over tokens and timesteps."""
        shares = []
        for layer in zip(*self._seen, strict=True):
            p_TNE = torch.stack(layer)
            within = p_TNE.var(dim=0, correction=0).mean(0).sum()
            total = p_TNE.flatten(0, 1).var(dim=0, correction=0).sum()
            shares.append((within / total.clamp(min=1e-30)).item())
        return tuple(shares)

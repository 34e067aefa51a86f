"""Pictures from a trained model, with the routing that made them.

Legend: n pictures, S pixels per side, T timesteps looked at, L sparse layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ecdit_train.config.schema import RunConfig, SampleConfig
from ecdit_train.diffusion.encoders import ImageCodec, TextEncoder
from ecdit_train.diffusion.sampler import See, halves, prompt_positions, sample
from ecdit_train.model.dit import DiT, Prediction
from ecdit_train.model.embed import Text, unpatchify
from ecdit_train.observe import figures
from ecdit_train.observe.routing import RoutingMaps, count_maps, expert_maps
from ecdit_train.parallel.context import ParallelContext
from ecdit_train.run_folder import routing_path

WATCHED_TIMESTEPS = 5
"""Timesteps, evenly spread over the sampler's steps, at which routing is recorded."""


Watcher = Callable[[float, Prediction], None]
"""Called with t and what the network said, at every evaluation."""


def sample_latents(
    model: DiT,
    *,
    features: tuple[Tensor, Tensor],
    position_B: Tensor,
    shape: tuple[int, int, int],
    config: SampleConfig,
    prediction: Literal["velocity", "data"],
    group_tokens: int,
    watch: Watcher | None = None,
    see: See | None = None,
) -> Tensor:
    """Latents (B, C, H, W) for `features` of texts (B, L, X) with their mask (B, L). B * patches must be whole routing groups.

    A picture depends on every picture in its group: `group_tokens` = patches of one image keeps them independent, the
    paper's 512 tokens (two images) are one override of the sample section. What the network makes of the text alone is
    made once for all steps (`model.embed.Prompt`).
    """
    features_BLX, mask_BL = features
    side = shape[1] // model.patch
    # Otherwise the captioned and the null half of guidance would share a group.
    whole = features_BLX.shape[0] * side * side % group_tokens == 0
    assert whole, f"{features_BLX.shape[0]} images are not whole groups of {group_tokens}"

    drop_B = halves(config, pictures=features_BLX.shape[0], device=features_BLX.device)
    times = drop_B.shape[0] // features_BLX.shape[0]
    both = Text(features_BLX=features_BLX.repeat(times, 1, 1), mask_BL=mask_BL.repeat(times, 1), drop_B=drop_B)
    with torch.no_grad():
        text = model.prompt(both)

    def network(x_BCHW: Tensor, t: float, t_B: Tensor) -> Tensor:
        out = model(x_BCHW, t_B=t_B, text=text, keep_BK=None, group_tokens=group_tokens)
        if watch is not None:
            watch(t, out)
        return unpatchify(out.patches_BKP.float(), patch=model.patch, side=side)

    position_B = position_B.to(features_BLX.device)
    return sample(network, position_B=position_B, shape=shape, config=config, prediction=prediction, see=see)


@dataclass(frozen=True, kw_only=True)
class Frame:
    """What is seen at one evaluation while pictures come out of noise: this rank's part of a batch."""

    t: float
    """0 is noise, 1 is data."""
    first: int
    """Number of the first of these pictures."""
    images: np.ndarray
    """uint8 (b, S, S, 3): what would come out if the rest of the way were straight."""
    counts: np.ndarray | None
    """(L, b, side, side) uint8: experts per patch, the captioned half; None for a dense model."""
    chosen: np.ndarray | None
    """(L, b, side, side, ceil(E / 8)) uint8: `observe.routing.expert_maps`."""


@dataclass(frozen=True, kw_only=True)
class Pictures:
    images: np.ndarray
    """uint8 (n, S, S, 3), in the order of the prompts."""
    prompts: tuple[str, ...]
    maps: RoutingMaps | None
    """None for a dense model."""


@dataclass(frozen=True, kw_only=True)
class SamplePipeline:
    """Draws prompts with the weights that the model holds now.

    On several ranks every rank must call it with the same prompts: each data-parallel rank draws its share, and the
    shares are put together.
    """

    parallel: ParallelContext
    text: TextEncoder
    codec: ImageCodec
    config: RunConfig

    def group_tokens(self, how: SampleConfig, *, batch: int) -> int:
        """Tokens of a routing group; an image's own where nothing is routed."""
        n = self.config.patches_per_image
        if self.config.moe.router is None:
            return n
        return {"image": n, "group": how.group_size, "batch": batch * n}[how.scope]

    def draw(
        self,
        prompts: Sequence[str],
        *,
        how: SampleConfig,
        step: int,
        batch: int = 64,
        watched: int = WATCHED_TIMESTEPS,
        on_frame: Callable[[Frame], None] | None = None,
    ) -> Pictures:
        """`step`: updates behind the weights, which say the routers' stage. At most `batch` pictures are in flight on a rank,
        rounded down to whole groups but one at least. Missing places of a group or of a rank are filled with copies of the last
        prompt, which are thrown away. Routing is kept of `watched` timesteps. `on_frame` is called at every evaluation (Heun's
        sampler: twice for most timesteps), fill-ins included, and may raise to end the drawing."""
        c, n, mesh, model = self.config, len(prompts), self.parallel.mesh, self.parallel.model
        images_per_group = self.group_tokens(how, batch=1) // c.patches_per_image
        batch = max(1, batch // images_per_group) * images_per_group
        position = prompt_positions(prompts)
        share = -(-n // (mesh.dp_size * images_per_group)) * images_per_group
        mine = [min(i, n - 1) for i in range(mesh.dp_rank * share, (mesh.dp_rank + 1) * share)]
        images, counts, who = [], [], []
        was_training = model.training
        model.eval()
        for router in model.routers:
            router.at_step(step)
        try:
            with self.parallel.drawing():
                for start in range(0, share, batch):
                    part = mine[start : start + batch]
                    recorder = _Recorder(_watched(how, watched), side=c.latent_side // c.model.patch, batch=len(part))
                    latents = sample_latents(
                        model,
                        features=self.text.encode([prompts[i] for i in part]),
                        position_B=position[part],
                        shape=(c.encoders.image.channels, c.latent_side, c.latent_side),
                        config=how,
                        prediction=c.diffusion.prediction,
                        group_tokens=self.group_tokens(how, batch=len(part)),
                        watch=recorder,
                        see=None if on_frame is None else self._framed(on_frame, recorder, first=part[0]),
                    )
                    images.append(self.codec.decode(latents))
                    counts.append(recorder.counts())
                    who.append(recorder.chosen())
        finally:
            model.train(was_training)
        pixels = self.parallel.gather(torch.cat(images))[:n].cpu().numpy()
        maps = None
        if counts[0] is not None and c.moe.router is not None:
            counted, chosen = (
                self.parallel.gather(torch.cat([x for x in parts if x is not None]))[:n].cpu().numpy()
                for parts in (counts, who)
            )
            maps = RoutingMaps(
                counts=counted.transpose(1, 2, 0, 3, 4),
                chosen=np.ascontiguousarray(chosen.transpose(1, 2, 0, 3, 4, 5)),
                timesteps=np.array(_watched(how, watched), dtype=np.float32),
                layers=c.sparse_layers,
                prompts=tuple(prompts),
                images=pixels,
                scope=how.scope,
                group_size=how.group_size,
                experts=c.moe.num_experts,
                capacity_factor=c.moe.router.at(step).experts_per_token(),
                step=step,
            )
        return Pictures(images=pixels, prompts=tuple(prompts), maps=maps)

    def _framed(self, on_frame: Callable[[Frame], None], recorder: _Recorder, *, first: int) -> See:
        sparse = self.config.moe.router is not None

        def see(t: float, latents_BCHW: Tensor) -> None:
            images = self.codec.decode(latents_BCHW).cpu().numpy()
            counts, chosen = (x.cpu().numpy() for x in recorder.now()) if sparse else (None, None)
            on_frame(Frame(t=t, first=first, images=images, counts=counts, chosen=chosen))

        return see


def _watched(how: SampleConfig, most: int) -> list[float]:
    """The timesteps recorded: evenly spread over the sampler's steps, the first and the last among them."""
    steps = np.unique(np.linspace(0, how.steps - 1, min(most, how.steps)).round().astype(int))
    times = how.sampler.times(how.steps)
    return [times[int(s)] for s in steps]


class _Recorder:
    """Keeps who worked on each patch of the conditional half, at the watched timesteps.

    Heun evaluates a t twice: first at its predictor's guess, then at the state itself. The later one is kept.
    """

    def __init__(self, wanted: Sequence[float], *, side: int, batch: int) -> None:
        self._wanted, self._side, self._batch = wanted, side, batch
        self._counts: dict[int, Tensor] = {}
        self._chosen: dict[int, Tensor] = {}
        self._now: Prediction | None = None

    def __call__(self, t: float, prediction: Prediction) -> None:
        self._now = prediction
        place = next((i for i, wanted in enumerate(self._wanted) if t == wanted), None)
        if place is not None and prediction.assignments:
            self._counts[place], self._chosen[place] = self.now()

    def now(self) -> tuple[Tensor, Tensor]:
        """Counts and experts of the newest evaluation: (L, B, side, side) and (L, B, side, side, ceil(E / 8)), uint8."""
        assert self._now is not None
        rows, assignments = self._now.patches_BKP.shape[0], self._now.assignments
        counts = count_maps(assignments, batch=rows, side=self._side)[:, : self._batch]
        return counts.to(torch.uint8), expert_maps(assignments, batch=rows, side=self._side)[:, : self._batch]

    def counts(self) -> Tensor | None:
        """(B, T, L, side, side) uint8, or None for a dense model."""
        return self._together(self._counts)

    def chosen(self) -> Tensor | None:
        """(B, T, L, side, side, ceil(E / 8)) uint8, or None for a dense model."""
        return self._together(self._chosen)

    def _together(self, seen: dict[int, Tensor]) -> Tensor | None:
        if not seen:
            return None
        return torch.stack([seen[i] for i in range(len(self._wanted))]).movedim(2, 0).contiguous()


@dataclass(frozen=True, kw_only=True)
class PromptGrid:
    """Draws the run's fixed prompts into its folder while it trains (`train.trainer.Drawer`)."""

    pipeline: SamplePipeline
    run: Path
    still_ours: Callable[[], None]
    """Raises if the folder is not this life's to write in any more."""

    def __call__(self, step: int) -> Path | None:
        c = self.pipeline.config
        pictures = self.pipeline.draw(c.observe.prompts, how=c.sample, step=step)
        if self.pipeline.parallel.runtime.rank != 0:
            return None
        self.still_ours()
        return write_pictures(pictures, run=self.run, how=c.sample, step=step)


def write_pictures(pictures: Pictures, *, run: Path, how: SampleConfig, step: int) -> Path:
    """`samples/step_N.png` with its `.json`, and `routing/step_N.npz` for a sparse model."""
    if pictures.maps is not None:
        pictures.maps.save(routing_path(run, step=step))
    return figures.write_samples(
        run,
        step=step,
        images=pictures.images,
        prompts=pictures.prompts,
        guidance=how.guidance,
        sampler=type(how.sampler).__name__.lower(),
        steps=how.steps,
        seed=how.seed,
        scope=how.scope,
    )

"""A trained model from Python: `ecdit_train.open_run`. docs/how-to/use-from-python.md shows it in use.

One process, on a GPU where there is one. Pictures are those of `ecdit sample`, pixel by pixel.

Legend: n pictures, S pixels per side, T timesteps, L sparse layers, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from ecdit_train.config import stored
from ecdit_train.config.schema import RunConfig, SampleConfig
from ecdit_train.drawing import drawing_layout
from ecdit_train.errors import ConfigError, Problem, RunFolderError
from ecdit_train.evaluate.pictures import Frame, SamplePipeline
from ecdit_train.evaluate.routing_probe import TIMESTEPS, KnownPictures, looks
from ecdit_train.evaluate.words import Unknown, unknown_words
from ecdit_train.observe import figures
from ecdit_train.observe.journal import read_records
from ecdit_train.observe.routing import RoutingMaps, count_maps, expert_maps
from ecdit_train.parallel.runtime import Runtime
from ecdit_train.run_folder import RESOLVED

if TYPE_CHECKING:
    from ecdit_train.export.pipeline import ECDiTPipeline

MODEL_INDEX = "model_index.json"
"""What a diffusers pipeline folder has."""


def open_run(
    folder: str | Path,
    *,
    step: int | None = None,
    weights: Literal["ema", "raw"] = "ema",
    device: str | torch.device | None = None,
    config_dir: str | Path | None = None,
) -> OpenRun:
    """A run folder, or what `ecdit ckpt export form=pipeline` made of one. Weights are read with the first picture.

    Args:
        folder: of the run or of the pipeline.
        step: a committed step; None: the newest. A pipeline holds one.
        weights: averaged (where the run keeps an average) or raw. A pipeline holds one of them.
        device: None: the GPU where there is one, else the CPU.
        config_dir: where the user's own modules are, if they are not where the run had them.

    Raises:
        RunFolderError: it is neither.
        ConfigError: a step or kind of weights that a pipeline folder cannot have.
    """
    folder = Path(folder).absolute()  # weights are read later, maybe from another working directory
    if weights not in ("ema", "raw"):
        raise ConfigError(Problem(field="weights", value=weights, rule="is ema or raw", nearest="ema"))
    where = torch.device(device) if device is not None else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(Problem(field="device", value=str(device), rule="there is no GPU here", nearest="cpu"))
    if (folder / MODEL_INDEX).is_file():
        for field, value in (("step", step), ("weights", None if weights == "ema" else weights)):
            if value is not None:
                raise ConfigError(Problem(field=field, value=value, rule=f"{folder} holds one set of weights"))
        return OpenRun(folder=folder, device=where, weights="ema", wanted=None, exported=True)
    if not (folder / RESOLVED).is_file():
        raise RunFolderError(f"{folder} is neither a run folder ({RESOLVED}) nor an exported pipeline ({MODEL_INDEX})")
    config = stored.load(folder, config_dir=config_dir)
    return OpenRun(folder=folder, device=where, weights=weights, wanted=step, run=replace(config, run=str(folder)))


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Pictures, and who worked on each of their patches. A notebook shows it as a grid."""

    images: np.ndarray
    """uint8 (n, S, S, 3)."""
    prompts: tuple[str, ...]
    maps: RoutingMaps | None
    """Experts per patch by timestep and layer; None for a dense model."""
    step: int
    """Updates behind the weights."""
    how: SampleConfig
    unknown: tuple[Unknown, ...]
    """Words that no training caption had."""

    def pil(self) -> list[figures.Picture]:
        return [figures.picture(image) for image in self.images]

    def grid(self, *, columns: int = 4) -> figures.Picture:
        """With captions, as `ecdit sample` writes it."""
        return figures.opened(figures.grid_png(self.images, self.prompts, columns=columns))

    def heatmap(self, image: int = 0) -> figures.Picture:
        """Experts per patch of one picture: layers down, timesteps across (the paper's Figure 6 b).

        Raises ConfigError for a dense model, or a picture that is not there.
        """
        if self.maps is None:
            raise ConfigError(Problem(field="moe", value="dense", rule="a dense network routes nothing"))
        if not 0 <= image < len(self.images):
            raise ConfigError(Problem(field="image", value=image, rule=f"there are {len(self.images)}", nearest=0))
        return figures.opened(figures.allocation_png(self.maps, image=image))

    def _repr_png_(self) -> bytes:
        return figures.grid_png(self.images, self.prompts)


@dataclass(kw_only=True)
class OpenRun:
    """Made by `open_run`."""

    folder: Path
    device: torch.device
    weights: Literal["ema", "raw"]
    wanted: int | None
    run: RunConfig | None = None
    exported: bool = False

    @property
    def config(self) -> RunConfig:
        """Frozen dataclasses; of an exported pipeline, what drawing needs is as the run had it."""
        return self.run if self.run is not None else self._pipeline[0].config

    @property
    def step(self) -> int:
        """Updates behind the weights; reads them."""
        return self._pipeline[1]

    def read(self) -> None:
        """Read the weights now.

        Raises:
            CheckpointError: no such step, or it is damaged.
            EncoderError: an encoder is not where the run says.
            ConfigError: the run's shards held what its encoders would make, so there is nothing to draw with.
        """
        _ = self._pipeline

    def records(self) -> list[dict[str, Any]]:
        """What the run logged: each step once, in order, by the names of docs/reference/metrics.md. A pipeline has none."""
        return read_records(self.folder)

    def unknown_words(self, prompts: str | Sequence[str]) -> list[Unknown]:
        """Words that no training caption had, for encoders that know only those."""
        return unknown_words(_listed(prompts), text=self._pipeline[0].text, seen=self._seen)

    def draw(
        self,
        prompts: str | Sequence[str],
        *,
        repeat: int = 1,
        guidance: float | None = None,
        steps: int | None = None,
        seed: int | None = None,
        scope: Literal["group", "image", "batch"] | None = None,
        timesteps: int = 5,
        on_frame: Callable[[Frame], None] | None = None,
    ) -> Drawn:
        """Pictures of the prompts; what is not given is the run's `sample` section.

        Args:
            prompts: one or several.
            repeat: all of them once, then all of them again with other noise.
            guidance: classifier-free guidance; 1 switches it off.
            steps: of the sampler.
            seed: of the starting noise: same prompt and seed, same picture.
            scope: tokens that compete for an expert. `image`: a picture does not depend on its neighbours.
            timesteps: at how many of the sampler's steps routing is kept.
            on_frame: called at every evaluation of the network with what is seen then.

        Raises:
            ConfigError: a value that cannot be.
        """
        listed, (pipeline, step) = _listed(prompts), self._pipeline
        given = {"guidance": guidance, "steps": steps, "seed": seed, "scope": scope}
        how = replace(pipeline.config.sample, **{k: v for k, v in given.items() if v is not None})  # type: ignore[arg-type]
        _check(listed, how, repeat=repeat, timesteps=timesteps)
        drawn = pipeline.draw([*listed] * repeat, how=how, step=step, watched=timesteps, on_frame=on_frame)
        unknown = unknown_words(listed, text=pipeline.text, seen=self._seen)
        return Drawn(
            images=drawn.images, prompts=drawn.prompts, maps=drawn.maps, step=step, how=how, unknown=tuple(unknown)
        )

    def route(
        self,
        images: np.ndarray,
        captions: Sequence[str],
        *,
        timesteps: Sequence[float] = TIMESTEPS,
        noise_seed: int = 0,
    ) -> RoutingMaps:
        """Who works on each patch of pictures that are there already, under noise, at given timesteps (0 noise, 1 data).

        Args:
            images: uint8 (n, S, S, 3) of the run's resolution.
            captions: n of them.

        Raises:
            ConfigError: a dense network, other sizes, or pictures that are no whole routing groups.
        """
        pipeline, step = self._pipeline
        c = pipeline.config
        side, S = c.latent_side // c.model.patch, c.data.resolution
        if c.moe.router is None:
            raise ConfigError(Problem(field="moe", value="dense", rule="a dense network routes nothing"))
        if images.dtype != np.uint8 or images.shape[1:] != (S, S, 3) or len(images) != len(captions):
            rule = f"needs uint8 (n, {S}, {S}, 3) and n captions; there are {len(captions)}"
            raise ConfigError(Problem(field="images", value=f"{images.dtype} {images.shape}", rule=rule))
        together = max(pipeline.group_tokens(c.sample, batch=1) // c.patches_per_image, 1)
        if not len(images) or len(images) % together:
            rule = f"must be whole routing groups of {together} pictures (sample.scope = {c.sample.scope})"
            raise ConfigError(Problem(field="images", value=len(images), rule=rule, nearest=together))
        no_objects = np.zeros((len(images), side * side), bool)
        known = KnownPictures(images=images, captions=tuple(captions), on_object=no_objects)
        counts, chosen = [], []
        for look in looks(pipeline, known, timesteps=timesteps, noise_seed=noise_seed):
            called = look.prediction.assignments
            counts.append(count_maps(called, batch=len(images), side=side).to(torch.uint8).cpu().numpy())
            chosen.append(expert_maps(called, batch=len(images), side=side).cpu().numpy())
        return RoutingMaps(
            counts=np.stack(counts),
            chosen=np.stack(chosen),
            timesteps=np.array(timesteps, np.float32),
            layers=c.sparse_layers,
            prompts=tuple(captions),
            images=images,
            scope=c.sample.scope,
            group_size=c.sample.group_size,
            experts=c.moe.num_experts,
            capacity_factor=c.moe.router.at(step).experts_per_token(),
            step=step,
        )

    @cached_property
    def _pipeline(self) -> tuple[SamplePipeline, int]:
        if self.exported:
            opened = _exported(self.folder, self.device)
            pipeline = opened.drawing()  # whose configuration has all but the sampler, which is the scheduler's
            whole = replace(pipeline.config, sample=opened.scheduler.how)
            return replace(pipeline, config=whole), int(opened.transformer.config["step"])
        from ecdit_train import build

        assert self.run is not None
        here = Runtime(rank=0, world=1, local_rank=self.device.index or 0, device=self.device, control=None)
        config = replace(self.run, parallel=drawing_layout(self.run.parallel, world=1))
        return build.build_pipeline(config, here, kind=self.weights, step=self.wanted)

    @cached_property
    def _seen(self) -> list[str] | None:
        from ecdit_train import build

        return None if self.exported else build.words_seen(str(self.folder), step=self.step)


def _exported(folder: Path, device: torch.device) -> ECDiTPipeline:
    from ecdit_train.export.pipeline import ECDiTPipeline

    return ECDiTPipeline.from_pretrained(str(folder), local_files_only=True).to(device)


def _listed(prompts: str | Sequence[str]) -> list[str]:
    return [prompts] if isinstance(prompts, str) else list(prompts)


def _check(prompts: Sequence[str], how: SampleConfig, *, repeat: int, timesteps: int) -> None:
    numbers: Mapping[str, int] = {"steps": how.steps, "repeat": repeat, "timesteps": timesteps}
    problems = [
        Problem(field=field, value=value, rule="must be at least 1", nearest=1)
        for field, value in numbers.items()
        if value < 1
    ]
    if not math.isfinite(how.guidance):
        problems.append(Problem(field="guidance", value=how.guidance, rule="must be a finite number", nearest=1.0))
    if not prompts:
        problems.append(Problem(field="prompts", value=[], rule="needs at least one"))
    if how.scope not in ("group", "image", "batch"):
        problems.append(Problem(field="scope", value=how.scope, rule="is group, image or batch", nearest="image"))
    if problems:
        raise ConfigError(problems)

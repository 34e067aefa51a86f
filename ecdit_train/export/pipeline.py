"""A pipeline folder as diffusers opens it. Importing this module makes its classes known to diffusers.

`DiffusionPipeline.from_pretrained` looks a pipeline's class up in diffusers itself and a component's in a module that is already
imported; it imports nothing because a folder says so. So a program says `import ecdit_train.export.pipeline` first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import diffusers
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput

from ecdit_train.batches.encoded import make_encoders
from ecdit_train.config.compose import compose
from ecdit_train.config.convert import with_values
from ecdit_train.config.schema import EncodersConfig, RunConfig, SampleConfig
from ecdit_train.errors import ConfigError, Problem
from ecdit_train.evaluate.pictures import SamplePipeline
from ecdit_train.parallel.context import ParallelContext
from ecdit_train.parallel.mesh import make_mesh
from ecdit_train.parallel.runtime import Runtime

from .scheduler import ECDiTFlowScheduler
from .transformer import ECDiTTransformer2DModel, section


class ECDiTPipeline(DiffusionPipeline):
    """Draws what `ecdit sample` draws, pixel by pixel: the same sampler around the same network.

    Frozen encoders are no components: the folder says their class and where they lie, and they are opened from there
    with the first picture.
    """

    transformer: ECDiTTransformer2DModel
    scheduler: ECDiTFlowScheduler

    def __init__(
        self,
        transformer: ECDiTTransformer2DModel,
        scheduler: ECDiTFlowScheduler,
        encoders: Mapping[str, Any] | None = None,
        resolution: int | None = None,
        precision: str = "fp32",
    ) -> None:
        """`encoders`: the run's section; `resolution`: pixels per side; `precision`: fp32 or bf16, what the network computes
        in. Raises ConfigError for what cannot be drawn with."""
        super().__init__()
        if encoders is None or resolution is None:
            raise ConfigError(Problem(field="encoders", value=encoders, rule="encoders and resolution are required"))
        section(EncodersConfig, encoders)  # asked before anything imports the classes that it names
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.register_to_config(encoders=dict(encoders), resolution=resolution, precision=precision)
        self._config = self._run_config()
        if self._config.train.compute == "bf16":
            transformer.compute_in(torch.bfloat16)
        self._open: tuple[torch.device, SamplePipeline] | None = None

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        num_images_per_prompt: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int | None = None,
        output_type: Literal["pil", "np"] = "pil",
    ) -> ImagePipelineOutput:
        """Pictures of the prompts; what is not given is the run's `sample` section.

        Args:
            prompt: one or several.
            num_images_per_prompt: as `ecdit sample repeat=N`: all prompts once, then all of them again.
            num_inference_steps: steps of the sampler.
            guidance_scale: 1 switches guidance off.
            seed: of the starting noise. There is no generator: a picture is a function of (seed, prompt, repetition).
            output_type: PIL images, or one uint8 array (n, S, S, 3).

        Raises:
            ConfigError: a value that cannot be.
            EncoderError: an encoder is not where the folder says.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        given: dict[str, Any] = {"steps": num_inference_steps, "guidance": guidance_scale, "seed": seed}
        how: SampleConfig = replace(self.scheduler.how, **{k: v for k, v in given.items() if v is not None})
        for field, value in (("num_inference_steps", how.steps), ("num_images_per_prompt", num_images_per_prompt)):
            if value < 1:
                raise ConfigError(Problem(field=field, value=value, rule="must be at least 1", nearest=1))
        if not prompts:
            raise ConfigError(Problem(field="prompt", value=prompts, rule="needs at least one"))
        drawn = self.drawing().draw(prompts * num_images_per_prompt, how=how, step=self.transformer.config["step"])
        images: Any = drawn.images
        if output_type == "pil":
            images = self.numpy_to_pil(drawn.images.astype("float32") / 255)  # it multiplies by 255 and rounds
        return ImagePipelineOutput(images=images)

    def drawing(self) -> SamplePipeline:
        """Our sampler around the transformer, on its device; encoders are opened once per device."""
        device = self.transformer.device
        if self._open is None or self._open[0] != device:
            config = self._config
            here = Runtime(rank=0, world=1, local_rank=0, device=device, control=None)
            parallel = ParallelContext(
                runtime=here,
                mesh=make_mesh(config.parallel, device_type=device.type, world=1),
                model=self.transformer,
                placements={},
            )
            found = make_encoders(config, device)
            if found.text is None or found.image is None:
                rule = "lay in the shards of the run; export with the encoders that made them (encoders/text=t5 ...)"
                raise ConfigError(Problem(field="encoders", value="stored", rule=rule))
            self._open = device, SamplePipeline(parallel=parallel, text=found.text, codec=found.image, config=config)
        return self._open[1]

    def _run_config(self) -> RunConfig:
        """The run as far as drawing reads it; all other sections have the defaults, one process among them."""
        network = self.transformer.config
        return with_values(
            compose([], local=False),
            {
                "model": network["model"],
                "moe": network["moe"],
                "diffusion.prediction": network["prediction"],
                "encoders": self.config["encoders"],
                "data.resolution": self.config["resolution"],
                "train.precision": self.config["precision"],
            },
        )


diffusers.ECDiTPipeline = ECDiTPipeline  # type: ignore[attr-defined]

"""KL autoencoders from a local folder. The only importer of diffusers.

Legend: B images, C latent channels, H W latent height and width, S pixels per side.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ecdit_train.config.rules import Checker
from ecdit_train.config.schema import RunConfig
from ecdit_train.config.slots import ImageCodecConfig
from ecdit_train.errors import EncoderError

from . import to_uint8
from .local_folder import load_frozen, local_folder

ENCODER_FLOPS_PER_PIXEL = 4.13e6
"""Forward of the encoder half of the usual four-level KL autoencoder (128-256-512-512 channels, 2 blocks each)."""


@dataclass(frozen=True, kw_only=True)
class KL(ImageCodecConfig):
    """Any diffusers AutoencoderKL, from one local folder."""

    path: str
    """Folder with config.json and safetensors weights."""
    channels: int
    """Channels of the latent."""
    factor: int
    """Pixels per latent, each way."""
    scale: float
    """latent = (encoded - shift) * scale; 1 / standard deviation of the encoded images is a good scale."""
    shift: float
    """Mean of the encoded images."""
    parameters: int
    """Frozen parameters, for the plan's totals (the paper counts 34M)."""

    def paths(self) -> tuple[str, ...]:
        return (self.path,)

    def num_parameters(self) -> int:
        return self.parameters

    def flops_per_image(self, *, resolution: int) -> float:
        return ENCODER_FLOPS_PER_PIXEL * resolution**2

    def check(self, run: RunConfig, check: Checker, *, key: str) -> None:
        check.at_least(0, [f"{key}.parameters"])
        check.positive([f"{key}.scale"])
        rule = "must be a local folder with config.json and safetensors weights"
        check.require(bool(self.path.strip()), f"{key}.path", rule=rule, nearest="encoders/vae")

    def build(self, *, device: torch.device | str, dtype: torch.dtype) -> KLCodec:
        return KLCodec(self, path=self.path, device=device, dtype=dtype)


class KLCodec:
    """Any diffusers AutoencoderKL from a local folder; latents are the posterior's mean, so nothing
    random is hidden here."""

    def __init__(self, config: ImageCodecConfig, *, path: str, device: torch.device | str, dtype: torch.dtype) -> None:
        folder = local_folder(path, what="encoders.image.path")
        from diffusers import AutoencoderKL

        model = load_frozen(AutoencoderKL.from_pretrained, folder, what="encoders.image.path", kind="an AutoencoderKL")
        self._model, self._dtype = model.to(device, dtype), dtype
        self.channels, factor = int(model.config.latent_channels), 2 ** (len(model.config.block_out_channels) - 1)
        self.scale, self.shift = config.scale, config.shift
        for field, said, found in (("channels", config.channels, self.channels), ("factor", config.factor, factor)):
            if said != found:
                raise EncoderError(
                    f"encoders.image.{field} = {said}: the codec in {path!r} has {found}; nearest valid: {found}"
                )

    @torch.no_grad()
    def encode(self, images_BSS3: Tensor) -> Tensor:
        x = images_BSS3.permute(0, 3, 1, 2).to(self._dtype) / 127.5 - 1.0
        return (self._model.encode(x).latent_dist.mean.float() - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents_BCHW: Tensor) -> Tensor:
        x = self._model.decode((latents_BCHW.float() / self.scale + self.shift).to(self._dtype)).sample
        return to_uint8(x.float())

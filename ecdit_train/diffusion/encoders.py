"""Frozen encoders behind two protocols: text to features, images to latents and back.

Real encoders come from local folders only (safetensors, no network, no code from the folder); the built-in ones need no
files.

Legend: B images, L text tokens, X feature width, C latent channels, H W latent height and width, S pixels per side.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ecdit_train import keyed
from ecdit_train.config.schema import ImageCodecConfig, TextEncoderConfig
from ecdit_train.errors import EncoderError


class TextEncoder(Protocol):
    width: int

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Features (B, L, X) and mask (B, L), True at real tokens. L is the configured maximum: static shapes."""
        ...


class ImageCodec(Protocol):
    channels: int

    def encode(self, images_BSS3: Tensor) -> Tensor:
        """uint8 (B, S, S, 3) to latents (B, C, H, W) fp32, shifted and scaled to about unit variance."""
        ...

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Latents back to uint8 (B, S, S, 3)."""
        ...


class HashTextEncoder:
    """Each word gets a fixed unit-variance vector keyed by its CRC-32, plus a weak position code: small, frozen, no
    files."""

    def __init__(self, *, width: int, max_tokens: int, device: torch.device | str = "cpu") -> None:
        self.width, self.max_tokens, self.device = width, max_tokens, device
        place = torch.arange(max_tokens)[:, None] / 10000.0 ** (torch.arange(0, width, 2) / width)
        self._position_LX = 0.3 * torch.cat([place.sin(), place.cos()], dim=1)[:, :width]
        self._words: dict[str, Tensor] = {}

    def _vector(self, word: str) -> Tensor:
        if word not in self._words:
            key = torch.tensor([zlib.crc32(word.encode())])
            self._words[word] = keyed.normal(0, keyed.Purpose.INIT, key, shape=(self.width,))[0]
        return self._words[word]

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        features = torch.zeros(len(captions), self.max_tokens, self.width)
        mask = torch.zeros(len(captions), self.max_tokens, dtype=torch.bool)
        for row, caption in enumerate(captions):
            words = re.findall(r"\w+", caption.lower())[: self.max_tokens]
            for place, word in enumerate(words):
                features[row, place] = self._vector(word) + self._position_LX[place]
            mask[row, : len(words)] = True
        return features.to(self.device), mask.to(self.device)


def _local_folder(path: str | None, *, what: str) -> Path:
    """The folder, or EncoderError when it, its config.json or its safetensors weights are missing."""
    if not path or not Path(path).is_dir():
        raise EncoderError(
            f"{what}: {path!r} is not a local folder; download the model there first (nothing is fetched at run time)"
        )
    if not (Path(path) / "config.json").is_file():
        raise EncoderError(f"{what}: no config.json in {path!r}")
    if not any(Path(path).glob("*.safetensors")):
        raise EncoderError(
            f"{what}: no safetensors weights in {path!r} (looked for *.safetensors); pickle files are refused"
        )
    return Path(path)


def _load(loader: Callable[..., Any], folder: Path, *, what: str, kind: str, **options: Any) -> Any:
    """A frozen model, whole. Both libraries fill tensors that a file lacks with random values and a warning; we
    refuse."""
    from safetensors import SafetensorError

    try:
        model, info = loader(folder, use_safetensors=True, local_files_only=True, output_loading_info=True, **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as e:
        raise EncoderError(f"{what}: {str(folder)!r} does not hold {kind}: {e}") from e
    missing = sorted(map(str, info["missing_keys"]))
    if missing:
        raise EncoderError(
            f"{what}: {str(folder)!r} does not hold {kind}: it lacks {len(missing)} of its tensors ({missing[0]})"
        )
    return model.eval().requires_grad_(False)


_TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "tokenizer_config.json")


class T5TextEncoder:
    """Any transformers T5 encoder with its tokenizer, from one local folder."""

    def __init__(self, config: TextEncoderConfig, *, device: torch.device | str, dtype: torch.dtype) -> None:
        folder = _local_folder(config.path, what="encoders.text.path")
        if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
            # transformers would make one with an empty vocabulary, and every word would be the same.
            names = ", ".join(_TOKENIZER_FILES)
            raise EncoderError(f"encoders.text.path: {config.path!r} does not hold a tokenizer (looked for {names})")
        from transformers import AutoTokenizer, T5EncoderModel

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as e:
            raise EncoderError(f"encoders.text.path: {config.path!r} does not hold a tokenizer: {e}") from e
        self._model = _load(
            T5EncoderModel.from_pretrained, folder, what="encoders.text.path", kind="a T5 encoder", dtype=dtype
        )
        self._model.to(device)
        self.width, self.max_tokens, self.device = int(self._model.config.d_model), config.max_tokens, device
        if self.width != config.width:
            raise EncoderError(
                f"encoders.text.width = {config.width}: the encoder in {config.path!r} is {self.width} wide; "
                f"nearest valid: {self.width}"
            )

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        tokens = self._tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=self.max_tokens, return_tensors="pt"
        ).to(self.device)
        features = self._model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        return features, tokens.attention_mask.bool()


class IdentityCodec:
    """Pixels as they are, in [-1, 1]."""

    channels = 3

    def __init__(self, config: ImageCodecConfig) -> None:
        self.scale, self.shift = config.scale, config.shift

    def encode(self, images_BSS3: Tensor) -> Tensor:
        x = images_BSS3.permute(0, 3, 1, 2).float() / 127.5 - 1.0
        return (x - self.shift) * self.scale

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        return _to_uint8(latents_BCHW.float() / self.scale + self.shift)


class KLCodec:
    """Any diffusers AutoencoderKL from a local folder; latents are the posterior's mean, so nothing random is hidden
    here."""

    def __init__(self, config: ImageCodecConfig, *, device: torch.device | str, dtype: torch.dtype) -> None:
        folder = _local_folder(config.path, what="encoders.image.path")
        from diffusers import AutoencoderKL

        model = _load(AutoencoderKL.from_pretrained, folder, what="encoders.image.path", kind="an AutoencoderKL")
        self._model, self._dtype = model.to(device, dtype), dtype
        self.channels, factor = int(model.config.latent_channels), 2 ** (len(model.config.block_out_channels) - 1)
        self.scale, self.shift = config.scale, config.shift
        for field, said, found in (("channels", config.channels, self.channels), ("factor", config.factor, factor)):
            if said != found:
                raise EncoderError(
                    f"encoders.image.{field} = {said}: the codec in {config.path!r} has {found}; nearest valid: {found}"
                )

    @torch.no_grad()
    def encode(self, images_BSS3: Tensor) -> Tensor:
        x = images_BSS3.permute(0, 3, 1, 2).to(self._dtype) / 127.5 - 1.0
        return (self._model.encode(x).latent_dist.mean.float() - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents_BCHW: Tensor) -> Tensor:
        x = self._model.decode((latents_BCHW.float() / self.scale + self.shift).to(self._dtype)).sample
        return _to_uint8(x.float())


def _to_uint8(x_BCSS: Tensor) -> Tensor:
    return ((x_BCSS + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def make_text_encoder(
    config: TextEncoderConfig, *, device: torch.device | str, dtype: torch.dtype
) -> TextEncoder | None:
    """None when the shards carry the embeddings."""
    if config.kind == "t5":
        return T5TextEncoder(config, device=device, dtype=dtype)
    if config.kind == "hash":
        return HashTextEncoder(width=config.width, max_tokens=config.max_tokens, device=device)
    return None


def make_image_codec(config: ImageCodecConfig, *, device: torch.device | str, dtype: torch.dtype) -> ImageCodec | None:
    """None when the shards carry the latents and no folder is given to decode them with."""
    if config.kind == "kl" or (config.kind == "shards" and config.path):
        return KLCodec(config, device=device, dtype=dtype)
    return IdentityCodec(config) if config.kind == "identity" else None

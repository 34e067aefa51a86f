"""A run's frozen encoders as the service of `data_pipeline.preparing.encode`: built where they run, named by their weights."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from data_pipeline.preparing.encode import Encoded, ToEncode
from ecdit_train.config.schema import EncodersConfig
from ecdit_train.config.slots import SlotConfig
from ecdit_train.errors import EncoderError

_DEPENDS_ON_NOTHING = ("path", "scale", "shift", "parameters")
"""Values of a slot that do not change what is stored: training applies scale and shift."""


@dataclass(frozen=True, kw_only=True)
class FrozenEncoders:
    """Args:
        latents, text: which of the two are made.
        device: "cuda" is one of the machine's, by the number of the process; "auto" is that where there is one.

    Raises EncoderError where the configuration has its features from shards, so that there is nothing to run.
    """

    config: EncodersConfig
    latents: bool = True
    text: bool = True
    device: str = "auto"

    def __post_init__(self) -> None:
        for name, asked, slot in (("image", self.latents, self.config.image), ("text", self.text, self.config.text)):
            if asked and slot.stored:
                raise EncoderError(
                    f"encoders.{name} reads from shards, it makes nothing; name the encoder that is to run, as in "
                    f"encoders/{name}={'kl' if name == 'image' else 't5'}"
                )

    def identity(self) -> Mapping[str, Any]:
        """The class and values of each encoder, and the sha256 of every file of it; not where they lie."""
        named = {"image": self.config.image if self.latents else None, "text": self.config.text if self.text else None}
        return {name: None if slot is None else _identity(slot) for name, slot in named.items()}

    def __call__(self, number: int) -> Callable[[ToEncode], Encoded]:
        """Build them, for the process of this number."""
        return _Running(self, device=_device(self.device, number=number))


class _Running:
    def __init__(self, frozen: FrozenEncoders, *, device: torch.device) -> None:
        config = frozen.config
        # Full precision: it runs once, and what is lost here is lost in every step.
        self._text = config.text.build(device=device, dtype=torch.float32) if frozen.text else None
        image = dataclasses.replace(cast(Any, config.image), scale=1.0, shift=0.0) if frozen.latents else None
        self._image = image.build(device=device, dtype=torch.float32) if image is not None else None
        self._device = device

    @torch.inference_mode()
    def __call__(self, batch: ToEncode) -> Encoded:
        latents = text = mask = None
        if self._image is not None:
            latents = self._image.encode(torch.from_numpy(batch.images).to(self._device)).float().cpu().numpy()
        if self._text is not None:
            features, real = self._text.encode(batch.captions)
            text, mask = features.float().cpu().numpy(), real.cpu().numpy()
        return Encoded(latents=latents, text=text, mask=mask)


def _device(name: str, *, number: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name != "cuda":
        return torch.device(name)
    if not torch.cuda.is_available():
        raise EncoderError("device=cuda: no CUDA device here; nearest valid value: device=cpu")
    return torch.device("cuda", number % torch.cuda.device_count())


def _identity(slot: SlotConfig) -> Mapping[str, Any]:
    values = {
        name: value for name, value in dataclasses.asdict(cast(Any, slot)).items() if name not in _DEPENDS_ON_NOTHING
    }
    files = {}
    for folder in map(Path, slot.paths()):
        for path in sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")):
            with path.open("rb") as file:
                files[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return {"class": type(slot).__name__, "values": values, "files": files}

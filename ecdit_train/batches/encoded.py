"""The loader's numpy batches as device tensors, through the frozen encoders where the shards hold raw data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from data_pipeline.contract import Batch, Loader
from data_pipeline.errors import SAMPLE_ERRORS, BadArray
from ecdit_train.config.schema import EncodersConfig, RunConfig
from ecdit_train.diffusion.encoders import MAX_WORDS, ImageCodec, KnowsWords, TextEncoder
from ecdit_train.diffusion.microbatch import Microbatch, Place


@dataclass(frozen=True, kw_only=True)
class Encoders:
    """The frozen networks of a run; None where there is nothing to run."""

    text: TextEncoder | None
    image: ImageCodec | None


def make_encoders(config: RunConfig, device: torch.device) -> Encoders:
    """In bf16 where the run is and the device is a GPU."""
    dtype = torch.bfloat16 if config.train.compute == "bf16" and device.type == "cuda" else torch.float32
    return Encoders(
        text=config.encoders.text.build(device=device, dtype=dtype),
        image=config.encoders.image.build(device=device, dtype=dtype),
    )


class EncodedBatches:
    """What the trainer gets (`train.trainer.Batches`)."""

    def __init__(
        self,
        loader: Loader,
        *,
        encoders: Encoders,
        config: EncodersConfig,
        latent_side: int,
        device: torch.device,
    ) -> None:
        self._loader, self._encoders, self._config, self._device = loader, encoders, config, device
        self._latent_side = latent_side
        self._first: tuple[Batch, Microbatch] | None = None
        self._words: set[str] = set()
        self._sorted: list[str] = []

    def prepare(self) -> None:
        """Make the first batch now: bad data is refused before a run folder is made for it. The loader's state is asked for only
        after `fetch`, so it never counts a batch that nobody trained on."""
        raw = next(self._loader)
        batch = self._encode(raw)
        self._first = raw, batch
        text = self._config.text
        for what, found, wanted in (
            (
                "latents of shape (channels, height, width)",
                tuple(batch.latents_BCHW.shape[1:]),
                self._latent_shape(raw),
            ),
            ("text embeddings of width", batch.features_BLX.shape[2], text.width),
        ):
            if found != wanted:
                raise BadArray(f"the shards hold {what} {found}; the configuration says {wanted}")

    def _latent_shape(self, raw: Batch) -> tuple[int, int, int]:
        """What the configuration says: of stored latents its resolution, of pictures what the codec makes of their size."""
        image, side = self._config.image, self._latent_side
        high, wide = (side, side) if raw.images is None else (size // image.factor for size in raw.images.shape[1:3])
        return image.channels, high, wide

    def fetch(self) -> Batch:
        return next(self._loader) if self._first is None else self._first[0]

    def encode(self, raw: Batch) -> Microbatch:
        first, self._first = self._first, None
        return self._encode(raw) if first is None else first[1]

    def substituted(self) -> int:
        return sum(self.bad().values())

    def counts(self) -> dict[str, int]:
        stats = self._loader.stats()
        # All classes on all ranks: the metrics of a window are reduced as one vector.
        bad = {kind.__name__: 0 for kind in SAMPLE_ERRORS} | dict(stats.bad)
        return {
            "data/substituted": sum(stats.bad.values()),
            "data/skipped": stats.skipped,
            "data/uncaptioned": stats.uncaptioned,
            "data/passed_over": stats.passed_over,
            "data/loader/samples": stats.samples,
            "data/loader/bytes_read": stats.bytes_read,
            "data/loader/bytes_fetched": stats.bytes_fetched,
            "data/loader/read_retries": stats.read_retries,
            "data/loader/hedged": stats.hedged,
            "data/loader/decoder_fallbacks": stats.decoder_fallbacks,
            **{f"data/bad/{kind}": count for kind, count in bad.items()},
        }

    def levels(self) -> dict[str, float]:
        stats = self._loader.stats()
        found = {
            "data/left_out": float(stats.left_out),
            "data/loader/steps_ready": float(min(stats.steps_ready, stats.steps_ahead)),
            "data/loader/steps_late_max": float(max(0, stats.steps_ahead - stats.steps_ready)),
        }
        if stats.epochs is not None:
            found["data/epochs"] = stats.epochs
        return found | {f"data/source/{source.name}/epochs": source.epochs for source in stats.sources}

    def words(self) -> list[str]:
        if len(self._sorted) != len(self._words):
            self._sorted = sorted(self._words)
        return self._sorted

    def bad(self) -> dict[str, int]:
        return dict(self._loader.stats().bad)

    def _encode(self, batch: Batch) -> Microbatch:
        if batch.latents is not None:
            image = self._config.image
            latents = (self._sent(batch.latents).float() - image.shift) * image.scale
        else:
            assert self._encoders.image is not None
            assert batch.images is not None
            latents = self._encoders.image.encode(self._sent(batch.images))
        if batch.text is not None:
            assert batch.text_mask is not None
            features, mask = self._sent(batch.text), self._sent(batch.text_mask)
        else:
            assert self._encoders.text is not None
            assert batch.captions is not None
            features, mask = self._encoders.text.encode(batch.captions)
            if isinstance(self._encoders.text, KnowsWords) and len(self._words) < MAX_WORDS:
                self._words.update(*map(self._encoders.text.words, batch.captions))
        return Microbatch(
            position_B=self._sent(batch.position),
            latents_BCHW=latents,
            features_BLX=features.to(self._device),
            mask_BL=mask.to(self._device),
            captioned_B=None if batch.captioned is None else self._sent(batch.captioned),
        )

    def _sent(self, array: np.ndarray) -> torch.Tensor:
        """On the device; the CPU does not wait where the loader made the array in page-locked memory. torch keeps that from being
        used again until the copy is done."""
        return torch.from_numpy(array).to(self._device, non_blocking=True)

    def close(self) -> None:
        self._loader.close()

    def place(self) -> Place:
        return Place(
            counts=self.counts(), levels=self.levels(), bad=self.bad(), words=self.words(), mark=self._loader.mark()
        )

    def state_dict(self, mark: Any = None) -> dict[str, Any]:
        return self._loader.state_dict(mark)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._loader.load_state_dict(state)

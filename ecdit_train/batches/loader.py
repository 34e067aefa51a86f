"""The loader of a run: its order, its share of a rank, and the members that the encoders need."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipeline.assemble import Fields, usual_fields
from data_pipeline.captions import CaptionRule
from data_pipeline.contract import Loader
from data_pipeline.errors import DataError
from data_pipeline.loader import StreamingLoader
from data_pipeline.stages import Stages
from data_pipeline.store.ahead import Reading
from data_pipeline.store.patience import Patience
from data_pipeline.streamed import StreamedLoader
from data_pipeline.url_samples import probe
from data_pipeline.urls import expand
from ecdit_train.batches.sources import open_sources
from ecdit_train.config.schema import RunConfig
from ecdit_train.parallel.mesh import Mesh
from ecdit_train.run_folder import quarantine_path


def pinned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Page-locked memory, which a GPU copies from while the CPU goes on. The array keeps it as long as it lives;
    then torch uses it again, once no copy out of it is under way."""
    return torch.empty(shape, dtype=torch.from_numpy(np.empty(0, dtype)).dtype, pin_memory=True).numpy()


def make_loader(
    config: RunConfig, mesh: Mesh, *, run: Path, life: int, held_out: bool = False, agree: Callable[[int], int] = int
) -> Loader:
    """This rank's share of every global batch: of the training, or of the images that are held out of it. What cannot be
    read is written down for this life. `agree`: the smallest of a number over all ranks.

    Raises DataError where the shards lack what the encoders need."""
    stages = config.data.stages.build()
    common: dict[str, Any] = {
        "global_batch": config.train.global_batch,
        "rank": mesh.dp_rank,
        "world": mesh.dp_size,
        "seed": config.train.seed,
        "resolution": config.data.resolution,
        "decoder": config.data.decoder.build(),
        "stages": Stages(stages) if stages else None,
        "threads": config.data.threads,
        "prefetch": config.data.prefetch,
        "on_bad": config.data.on_bad,
        # The same few images at every measurement: a share of them says nothing. What was replaced is in the record.
        "max_bad": 1e9 if held_out else config.data.max_bad,
        # Tensor-parallel ranks read the same samples; one of them writes down what was bad.
        "quarantine": quarantine_path(run, dp_rank=mesh.dp_rank, life=life)
        if mesh.tp_rank == 0 and not held_out
        else None,
    }
    if config.data.order == "streamed":
        urls = expand(config.data.shards, allow_pipe=config.data.allow_pipe)
        fields = _fields(config, have=probe(urls, patient=config.data.on_bad == "substitute").fields)
        return StreamedLoader(
            urls, fields=fields, captions=_captions(config, fields), shuffle=config.data.shuffle, agree=agree, **common
        )
    # Two questions to the file system for every shard: one rank asks them, once. The others meet its error (`runtime.together`).
    asks = mesh.rank == 0 and not held_out
    data = open_sources(config.data, check_files=asks)
    fields = _fields(config, have=data.view.fields)
    return StreamingLoader(
        data,
        fields=fields,
        captions=_captions(config, fields),
        reading=Reading(in_flight=config.data.in_flight, budget=config.data.read_budget),
        patience=Patience(
            retries=config.data.read_retries,
            deadline=config.data.read_deadline,
            idle=min(Patience.idle, config.data.read_deadline / 2),
            hedge_after=config.data.hedge_after,
        ),
        allocate=pinned if torch.cuda.is_available() else None,
        held_out=config.validation.images,
        only_held_out=held_out,
        **common,
    )


def _fields(config: RunConfig, *, have: Collection[str]) -> Fields:
    """The members that the encoders need, of those that there are. Raises DataError where one is missing."""
    stored_latents, stored_text = config.encoders.image.stored, config.encoders.text.stored
    usual = usual_fields(have, text_len=config.encoders.text.max_tokens if stored_text else 0)
    fields = replace(
        usual,
        images=() if stored_latents else usual.images,
        latents=usual.latents if stored_latents else None,
        captions=() if stored_text else config.data.captions or usual.captions,
        text=usual.text if stored_text else None,
    )
    for encoder, found in (
        (config.encoders.image, fields.latents if stored_latents else fields.images),
        (config.encoders.text, fields.text if stored_text else fields.captions),
    ):
        if not found:
            raise DataError(
                f"{', '.join(source.shards for source in config.data.named.values()) or config.data.shards}: "
                f"{type(encoder).__name__} needs a member that the shards do not have; they hold {', '.join(sorted(have))}"
            )
    return fields


def _captions(config: RunConfig, fields: Fields) -> CaptionRule:
    return CaptionRule(
        sources=fields.captions,
        weights=config.data.caption_weights if fields.captions else (),
        missing=config.data.no_caption,
    )

"""The loader of a run: its order, its share of a rank, and the members that the encoders need."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from data_pipeline.assemble import default_fields
from data_pipeline.captions import CaptionRule
from data_pipeline.errors import DataError
from data_pipeline.loader import StreamingLoader
from data_pipeline.sources import Named, open_data
from ecdit_train.config.schema import RunConfig
from ecdit_train.parallel.mesh import Mesh
from ecdit_train.run_folder import quarantine_path


def make_loader(config: RunConfig, mesh: Mesh, *, run: Path, life: int, held_out: bool = False) -> StreamingLoader:
    """This rank's share of every global batch: of the training, or of the images that are held out of it. What cannot be
    read is written down for this life.

    Raises DataError where the shards lack what the encoders need."""
    named = {
        name: Named(shards=source.shards, weight=source.weight, keep=source.keep, manifest=source.manifest)
        for name, source in config.data.named.items()
    }
    # Two questions to the file system for every shard: one rank asks them, once. The others meet its error (`runtime.together`).
    asks = mesh.rank == 0 and not held_out
    data = open_data(named, take_down=config.data.take_down, check_files=asks)
    view = data.view
    stored_latents, stored_text = config.encoders.image.stored, config.encoders.text.stored
    have = default_fields(view, text_len=config.encoders.text.max_tokens if stored_text else 0)
    fields = replace(
        have,
        images=() if stored_latents else have.images,
        latents=have.latents if stored_latents else None,
        captions=() if stored_text else config.data.captions or have.captions,
        text=have.text if stored_text else None,
    )
    for encoder, found in (
        (config.encoders.image, fields.latents if stored_latents else fields.images),
        (config.encoders.text, fields.text if stored_text else fields.captions),
    ):
        if not found:
            raise DataError(
                f"{view.folder}: {type(encoder).__name__} needs a member "
                f"that the shards do not have; they hold {', '.join(view.fields)}"
            )
    return StreamingLoader(
        data,
        global_batch=config.train.global_batch,
        rank=mesh.dp_rank,
        world=mesh.dp_size,
        seed=config.train.seed,
        fields=fields,
        captions=CaptionRule(
            sources=fields.captions,
            weights=config.data.caption_weights if fields.captions else (),
            missing=config.data.no_caption,
        ),
        resolution=config.data.resolution,
        threads=config.data.threads,
        prefetch=config.data.prefetch,
        on_bad=config.data.on_bad,
        # The same few images at every measurement: a share of them says nothing. What was replaced is in the record.
        max_bad=1e9 if held_out else config.data.max_bad,
        # Tensor-parallel ranks read the same samples; one of them writes down what was bad.
        quarantine=quarantine_path(run, dp_rank=mesh.dp_rank, life=life)
        if mesh.tp_rank == 0 and not held_out
        else None,
        held_out=config.validation.images,
        only_held_out=held_out,
    )

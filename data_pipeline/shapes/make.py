"""The shapes set written to shards; a sample is drawn when its shard is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.manifest import View, read_manifest
from data_pipeline.parts import Part
from data_pipeline.prepare import ImageFormat, RawMembers, encode_image, write_shards
from data_pipeline.shapes.draw import ShapesSpec, shape_sample
from data_pipeline.shapes.prompts import Split


def make_shapes(
    folder: Path | str, *, count: int, resolution: int = 32, seed: int = 0, mix: Mapping[str, float] | None = None,
    scale: tuple[float, float] = (0.2, 0.35), split: Split = "train",
    samples_per_shard: int = 1000, image_format: ImageFormat = "png", workers: int = 1,
    part: Part | None = None,
) -> View | None:  # fmt: skip
    """Write the procedural shapes set: image, caption (txt) and GenEval metadata (json, with `caption`) per sample.

    `part`: only these shards; None is returned while others are missing (`write_shards`).

    Raises:
        DataError: parameters outside the rules of `ShapesSpec`; see also `write_shards`.
    """
    settings: dict[str, Any] = {"resolution": resolution, "scale": tuple(scale), "split": split}
    spec = ShapesSpec(**settings) if mix is None else ShapesSpec(mix=dict(mix), **settings)
    if image_format not in ("png", "jpg", "npy"):
        raise DataError(f"image_format = {image_format!r}: must be png, jpg or npy")
    samples = _ShapesSamples(spec=spec, seed=seed, count=count, image_format=image_format)
    params = {"made_by": "make_shapes", "version": 1, "seed": seed, "image_format": image_format, **asdict(spec)}
    params["scale"] = list(spec.scale)
    return write_shards(
        samples, folder, samples_per_shard=samples_per_shard, name="shapes", params=params, workers=workers, part=part
    )


def made_with(folder: Path | str) -> tuple[ShapesSpec, int] | None:
    """(what is drawn, seed) of a set that `make_shapes` wrote into a folder; None for anything else."""
    try:
        meta = read_manifest(folder).meta
        if meta.get("made_by") != "make_shapes":
            return None
        scale = (float(meta["scale"][0]), float(meta["scale"][1]))
        spec = ShapesSpec(resolution=int(meta["resolution"]), mix=dict(meta["mix"]), scale=scale, split=meta["split"])
        return spec, int(meta["seed"])
    except (DataError, OSError, KeyError, TypeError, ValueError):  # not there, or of another version
        return None


@dataclass(frozen=True, kw_only=True)
class _ShapesSamples:
    """Samples that are drawn when asked for (`prepare.Samples`)."""

    spec: ShapesSpec
    seed: int
    count: int
    image_format: ImageFormat

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int, /) -> RawMembers:
        sample = shape_sample(index, spec=self.spec, seed=self.seed)
        members = {
            self.image_format: encode_image(sample.image, image_format=self.image_format),
            "txt": sample.caption.encode(),
            "json": json.dumps({**sample.metadata, "caption": sample.caption}, sort_keys=True).encode(),
        }
        return RawMembers(key=f"{index:08d}", members=members)

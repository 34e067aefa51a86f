"""True pictures of one's own with known objects: a folder of NAME.png (or .jpg), NAME.mask.png, NAME.txt."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ecdit_train.errors import ConfigError, Problem

from .allocation import on_patches
from .routing_probe import KnownPictures

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MASK = ".mask.png"


def masked_pictures(folder: Path, *, resolution: int, side: int, multiple: int) -> KnownPictures:
    """Pictures cut to the middle square and scaled to `resolution`; the mask likewise, white (128 and more) is object. A picture
    without a .txt has the empty caption. As many as are whole multiples of `multiple`, in the order of their names.

    Raises:
        ConfigError: no such pictures, a picture without a mask, sizes that differ, a file that is no picture.
    """
    found = sorted(p for p in folder.glob("*") if p.suffix.lower() in SUFFIXES and not p.name.endswith(MASK))
    count = len(found) // multiple * multiple
    if not count:
        rule = (
            f"needs {multiple} or more pictures NAME.png with NAME{MASK} and NAME.txt beside them; it has {len(found)}"
        )
        raise ConfigError(Problem(field="pictures", value=str(folder), rule=rule))
    images, masks, captions = [], [], []
    for path in found[:count]:
        picture, mask = _opened(path, "RGB"), _opened(path.with_name(path.stem + MASK), "L")
        if picture.size != mask.size:
            rule = f"is {mask.size[0]} x {mask.size[1]} pixels, its picture {picture.size[0]} x {picture.size[1]}"
            raise ConfigError(Problem(field="pictures", value=path.stem + MASK, rule=rule))
        size = (resolution, resolution)
        images.append(np.asarray(ImageOps.fit(picture, size, method=Image.Resampling.BICUBIC)))
        masks.append(np.asarray(ImageOps.fit(mask, size, method=Image.Resampling.BOX)) >= 128)
        text = path.with_suffix(".txt")
        captions.append(text.read_text(encoding="utf-8", errors="replace").strip() if text.exists() else "")
    return KnownPictures(
        images=np.stack(images), captions=tuple(captions), on_object=on_patches(np.stack(masks), side=side)
    )


def _opened(path: Path, mode: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert(mode)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ConfigError(Problem(field="pictures", value=str(path), rule=f"cannot be read: {error}")) from error

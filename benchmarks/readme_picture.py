"""The README's picture, made from a demo run: what it draws, and how many experts took each patch.

    python -m benchmarks.readme_picture runs/demo docs/images/demo.png

Also prints, layer by layer, the mean number of experts per patch of the shapes and of the background.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.shapes.draw import BACKGROUND
from data_pipeline.shapes.grader import FOREGROUND_DISTANCE
from ecdit_train.observe import figures
from ecdit_train.observe.routing import RoutingMaps
from ecdit_train.run_folder import ROUTING, by_step


def main(run: Path, out: Path) -> None:
    """The newest routing maps of the run hold the pictures too."""
    _, newest = by_step(run / ROUTING, suffix=".npz")[-1]
    maps = RoutingMaps.load(newest)
    with tempfile.TemporaryDirectory() as folder:
        grid = figures.sample_grid(maps.images[:4], maps.prompts[:4], Path(folder) / "grid.png", columns=2, scale=192)
        heat = figures.allocation_heatmap(maps, Path(folder) / "heat.png", columns=5)
        left, right = Image.open(grid).convert("RGB"), Image.open(heat).convert("RGB")
    right = right.resize((round(right.width * left.height / right.height), left.height), Image.Resampling.LANCZOS)
    canvas = Image.new("RGB", (left.width + right.width + 24, left.height), "white")
    canvas.paste(left, (0, 0))
    canvas.paste(right, (left.width + 24, 0))
    out.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(out, optimize=True)
    for layer, (inside, outside) in experts_per_patch(maps).items():
        print(f"layer {layer}: {inside:.2f} experts per patch of a shape, {outside:.2f} per patch of the background")


def experts_per_patch(maps: RoutingMaps) -> dict[int, tuple[float, float]]:
    """Layer -> mean experts per patch of the shapes and of the background, over pictures and timesteps. A patch belongs to a
    shape where the grader's rule finds foreground in half of its pixels."""
    side = maps.counts.shape[-1]
    B, pixels = len(maps.images), maps.images.shape[1] // side
    distance = np.linalg.norm(maps.images.astype(np.float32) - np.array(BACKGROUND, np.float32), axis=-1)
    cells = (distance > FOREGROUND_DISTANCE).reshape(B, side, pixels, side, pixels)
    shape_BSS = cells.mean(axis=(2, 4)) >= 0.5
    counts_LBSS = maps.counts.mean(axis=0)
    return {
        layer: (float(c[shape_BSS].mean()), float(c[~shape_BSS].mean()))
        for layer, c in zip(maps.layers, counts_LBSS, strict=True)
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

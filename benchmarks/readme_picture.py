"""The README's picture, made from a demo run: what it draws, and how many experts took each patch.

    python -m benchmarks.readme_picture runs/demo docs/images/demo.png

How many experts objects and background get is what `ecdit allocation run=runs/demo` says.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from PIL import Image

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


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

"""Pictures, drawn without a display: grids of samples, where the experts work (the paper's Figure 6)."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ecdit_train import atomic
from ecdit_train.run_folder import samples_path

from .routing import RoutingMaps

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Picture = Image.Image
"""PIL's."""
INK = "#1f2937"
MUTED = "#6b7280"
HEAT, HEAT_ALPHA = "YlOrRd", 0.78
"""Darker is more compute, as in the paper."""


# --- samples ---------------------------------------------------------------------------------------------------------


def sample_grid(images: np.ndarray, captions: Sequence[str], path: Path, *, columns: int = 4, scale: int = 128) -> Path:
    """`grid_png` as a file, replaced atomically."""
    atomic.write(path, grid_png(images, captions, columns=columns, scale=scale))
    return path


def grid_png(images: np.ndarray, captions: Sequence[str], *, columns: int = 4, scale: int = 128) -> bytes:
    """Pictures with their captions below them, as a PNG.

    images: (n, H, W, 3) uint8. `scale`: the side, in pixels, up to which small pictures are enlarged (by a whole
    factor, nearest, so that a pixel stays a square); larger ones are left alone. Captions wrap, three lines at most.
    """
    assert images.dtype == np.uint8 and images.shape[3:] == (3,), f"{images.dtype} {images.shape}"  # noqa: PT018
    factor = max(1, round(scale / images.shape[1]))
    tiles = images.repeat(factor, axis=1).repeat(factor, axis=2)
    height, width = tiles.shape[1:3]
    font = _font(size=max(12, min(18, width // 11)))
    line = math.ceil(sum(font.getmetrics()) * 1.1)
    gap, columns = max(12, width // 12), max(1, min(columns, len(tiles)))
    cells = [(tile, _wrap(text, font=font, width=width)) for tile, text in zip(tiles, captions, strict=True)]
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    heights = [height + 6 + line * max(len(lines) for _, lines in row) + gap for row in rows]
    canvas = Image.new("RGB", (gap + columns * (width + gap), gap + sum(heights)), "white")
    draw = ImageDraw.Draw(canvas)
    y = gap
    for row, row_height in zip(rows, heights, strict=True):
        for n, (tile, lines) in enumerate(row):
            x = gap + n * (width + gap)
            canvas.paste(Image.fromarray(tile), (x, y))
            draw.rectangle((x - 1, y - 1, x + width, y + height), outline="#d1d5db")
            for i, text in enumerate(lines):
                draw.text((x, y + height + 5 + i * line), text, fill=INK, font=font)
        y += row_height
    buffer = io.BytesIO()
    canvas.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def picture(image: np.ndarray) -> Picture:
    """uint8 (H, W, 3)."""
    return Image.fromarray(image)


def opened(png: bytes) -> Picture:
    return Image.open(io.BytesIO(png))


def write_samples(
    run_folder: Path,
    *,
    step: int,
    images: np.ndarray,
    prompts: Sequence[str],
    guidance: float,
    sampler: str,
    steps: int,
    seed: int,
    scope: str,
    columns: int = 4,
) -> Path:
    """`samples/step_<n>.png` and the `.json` that says how it was drawn. Returns the PNG."""
    path = samples_path(run_folder, step=step)
    about = {
        "step": step,
        "prompts": list(prompts),
        "guidance": guidance,
        "sampler": sampler,
        "steps": steps,
        "seed": seed,
        "scope": scope,
    }
    atomic.write(path.with_suffix(".json"), json.dumps(about, ensure_ascii=False, indent=1).encode())
    return sample_grid(images, prompts, path, columns=columns)


def _font(*, size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings: the same picture on every machine."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), size)


def _wrap(text: str, *, font: ImageFont.FreeTypeFont, width: int, max_lines: int = 3) -> list[str]:
    """Lines no wider than `width` pixels; an ellipsis where something is missing."""
    lines = [""]
    for word in text.split():
        grown = f"{lines[-1]} {word}".strip()
        if font.getlength(grown) <= width or not lines[-1]:
            lines[-1] = grown
        else:
            lines.append(word)
    if len(lines) > max_lines:
        lines = [*lines[: max_lines - 1], f"{lines[max_lines - 1]} …"]
    for n, line in enumerate(lines):
        while font.getlength(line) > width and len(line) > 2:
            line = line.removesuffix("…").rstrip()[:-1] + "…"
        lines[n] = line
    return lines


# --- allocation ------------------------------------------------------------------------------------------------------


def allocation_heatmap(maps: RoutingMaps, path: Path, *, image: int = 0, columns: int = 6) -> Path:
    """`allocation_png` as a file, replaced atomically."""
    atomic.write(path, allocation_png(maps, image=image, columns=columns))
    return path


def allocation_png(maps: RoutingMaps, *, image: int = 0, columns: int = 6) -> bytes:
    """Figure 6(b): sparse layers down, at most `columns` evenly spaced timesteps across, experts per patch over the
    finished picture on one colour scale."""
    shown = _evenly(len(maps.timesteps), columns)
    return _heatmaps(
        [[maps.counts[t, layer, image] for t in shown] for layer in range(len(maps.layers))],
        pictures=[maps.images[image]] * len(maps.layers),
        row_labels=[f"layer {n}" for n in maps.layers],
        column_labels=[f"t = {maps.timesteps[t]:.2f}" for t in shown],
        title=maps.prompts[image],
        caption=maps.caption(),
    )


def allocation_layers(
    maps: RoutingMaps,
    path: Path,
    *,
    timestep: int | None = None,
    images: Sequence[int] = (0,),
    columns: int = 10,
) -> Path:
    """Figure 6(a): a picture a row, at most `columns` of its sparse layers across, at one timestep.

    `timestep` is an index into `maps.timesteps`; None: the middle one.
    """
    t = len(maps.timesteps) // 2 if timestep is None else timestep
    shown = _evenly(len(maps.layers), columns)
    png = _heatmaps(
        [[maps.counts[t, layer, b] for layer in shown] for b in images],
        pictures=[maps.images[b] for b in images],
        row_labels=[""] * len(images),
        column_labels=[f"layer {maps.layers[n]}" for n in shown],
        title=maps.prompts[images[0]] if len(images) == 1 else "",
        caption=f"t = {maps.timesteps[t]:.2f}, {maps.caption()}",
    )
    atomic.write(path, png)
    return path


def _evenly(num: int, most: int) -> list[int]:
    """At most `most` indices below `num`, first and last included."""
    return sorted({round(i) for i in np.linspace(0, num - 1, min(num, most)).tolist()})


def _heatmaps(
    panels: Sequence[Sequence[np.ndarray]],
    *,
    pictures: Sequence[np.ndarray],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    title: str,
    caption: str,
) -> bytes:
    """panels[row][column]: (side, side) counts over `pictures[row]`, which leads its row; one colour scale from 0."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, Normalize

    # Inches: panels of a fixed size between fixed margins.
    size, margin, gap = 1.3, 0.75, 0.08
    above, below = (0.62 if title else 0.34), 0.32
    rows, columns = len(panels), len(panels[0]) + 1
    width, height = columns * size + 2 * margin, rows * size + above + below
    left, right, top, bottom = margin / width, 1 - margin / width, 1 - above / height, below / height
    figure = new_figure(width, height)
    grid = figure.subplots(rows, columns, squeeze=False)
    figure.subplots_adjust(left, bottom, right, top, wspace=gap, hspace=gap)

    vmax = max(1, int(max(counts.max() for row in panels for counts in row)))
    discrete = vmax <= 12
    norm: Normalize = BoundaryNorm(np.arange(-0.5, vmax + 1), 256) if discrete else Normalize(0, vmax)
    for row, picture, axes_row, label in zip(panels, pictures, grid, row_labels, strict=True):
        extent = (0, picture.shape[1], picture.shape[0], 0)
        for axes in axes_row:
            axes.set(xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set_color("#d1d5db")
        axes_row[0].imshow(picture, extent=extent, interpolation="nearest")
        axes_row[0].set_ylabel(label, fontsize=9, color=INK)
        for axes, counts in zip(axes_row[1:], row, strict=True):
            axes.imshow(_pale(picture), extent=extent, interpolation="nearest", cmap="gray", vmin=0, vmax=255)
            axes.imshow(counts, extent=extent, interpolation="nearest", cmap=HEAT, norm=norm, alpha=HEAT_ALPHA)
    for axes, label in zip(grid[0], ["picture", *column_labels], strict=True):
        axes.set_title(label, fontsize=9, color=INK, pad=4)

    bar_axes = figure.add_axes((right + 0.12 / width, bottom, 0.13 / width, top - bottom))
    ticks = range(vmax + 1) if discrete else None
    bar = figure.colorbar(ScalarMappable(norm, HEAT), cax=bar_axes, ticks=ticks, alpha=HEAT_ALPHA)
    bar.set_label("experts per patch", fontsize=9, color=INK)
    bar.ax.tick_params(labelsize=8, length=0)
    bar.minorticks_off()
    bar_axes.spines["outline"].set_edgecolor("#d1d5db")
    limit = int((width - 2 * margin) * 11)
    short = title if len(title) <= limit else title[: limit - 1] + "…"
    figure.text(left, 1 - 0.1 / height, short, size=11, color=INK, va="top", weight="bold", parse_math=False)
    figure.text(left, 0.1 / height, caption, size=8, color=MUTED, va="bottom", parse_math=False)
    return png_of(figure)


def _pale(picture: np.ndarray) -> np.ndarray:
    """(H, W) grey between 150 and 255: shapes show through the colours but do not pass for counts."""
    grey = picture.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    return (150 + grey * (105 / 255)).astype(np.uint8)


def new_figure(width: float, height: float) -> Figure:
    """A figure outside pyplot: no display, no global state, safe in any thread. Inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def png_of(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight", pad_inches=0.08)
    return buffer.getvalue()


def save(figure: Figure, path: Path) -> Path:
    atomic.write(path, png_of(figure))
    return path


SMALL = 256


def small_picture(image: np.ndarray) -> str:
    """A data URI of a picture, (H, W, 3) uint8: as it is where it is small, else scaled down and with a little loss."""
    picture, buffer = Image.fromarray(image), io.BytesIO()
    if max(picture.size) <= SMALL // 4:
        picture.save(buffer, format="PNG", optimize=True)
        kind = "png"
    else:
        picture.thumbnail((SMALL, SMALL))
        picture.save(buffer, format="JPEG", quality=88)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"

"""`report.html`: everything a run folder knows, in one file that opens without a network. The same page is served live
(`observe.serve`), which asks for the parts whose files have changed."""

from __future__ import annotations

import base64
import logging
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ecdit_train import atomic
from ecdit_train import run_folder as folder
from ecdit_train.errors import RunFolderError

from . import allocation_section, tables
from .charts import draw
from .curves import charts, columns
from .explorer import evenly, pack
from .figures import allocation_layers, allocation_png
from .journal import read_records
from .page import render
from .redact import redact_text
from .routing import RoutingMaps
from .tables import read_config, read_json
from .which_run import run_folder as checked

logger = logging.getLogger("ecdit.observe")

MAX_GRIDS = 60
"""Sample grids embedded; of a longer run an even choice, first and last included, so that the file stays sendable."""
MAX_PROMPTS, MAX_PANELS = 4, 60
"""Prompts of the latest routing maps that get their own still figure, for paper and for readers without scripts; and the maps in
those figures, of a large model: it takes a second to draw a few, and a megabyte to keep them."""


def write_report(run_folder: Path) -> Path:
    """Writes `<run>/report.html`, replacing it atomically; sections whose files are missing are left out.

    Raises:
        RunFolderError: the folder is not a run.
    """
    run = checked(run_folder)
    path = run / folder.REPORT
    atomic.write(path, page(run, {name: shown(name, run, part) for name, part in PARTS.items()}).encode())
    return path


@dataclass(frozen=True, kw_only=True)
class Built:
    """A part of the page."""

    sections: Mapping[str, str]
    """id -> HTML of its inside; empty where there is nothing to show."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """What scripts read: id of the element -> JSON."""
    broken: bool = False
    """Something in its files could not be shown."""


TITLES: Mapping[str, tuple[str, str, str]] = {
    "learning": ("Learning", "Learning", "Strong lines are moving averages, pale ones the records themselves."),
    "samples": (
        "Samples",
        "Samples",
        "The same prompts and the same noise at every step; move the slider through the run.",
    ),
    "explorer": (
        "Where the experts work",
        "Experts",
        "Who took which patch while a picture came out of noise: t = 0 is noise, t = 1 the picture. Choose an expert to see its "
        "patches, or a patch to see its experts.",
    ),
    "allocation": (
        "Where compute goes",
        "Compute",
        "Experts of a patch on an object and of a patch of the background, by layer and timestep (ecdit allocation).",
    ),
    "routing": (
        "Routing over the run",
        "Routing",
        "Experts take tokens; these curves say how evenly, how sure, and who is left out.",
    ),
    "speed": ("Speed, data, reliability", "Speed", "Time spent in checkpoints and samples is left out of speeds."),
    "evaluation": ("Evaluation", "Evaluation", "Results stored in the run folder."),
    "values": ("Last values", "Values", "Per-layer routing values are in the curves above."),
    "configuration": ("Configuration", "Configuration", "The short version; the whole file is below."),
}
"""Sections in the order of the page: title, its name in the bar, and what it shows."""


def page(run: Path, parts: Mapping[str, Built], *, live: bool = False) -> str:
    """The whole page. `live`: it goes on asking the server that it came from."""
    sections = {name: html for part in parts.values() for name, html in part.sections.items()}
    return render(
        "report.html",
        title=run.resolve().name,
        experiment=read_config(run).get("experiment") or "a run of ecdit",
        written=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        tiles=sections.get("tiles", ""),
        sections=[(name, *TITLES[name], sections.get(name, "")) for name in TITLES],
        data={name: value for part in parts.values() for name, value in part.data.items()},
        live=live,
    )


# --- parts: what is made anew when some files change ------------------------------------------------------------------


def records_part(run: Path) -> Built:
    """Curves, and the last value of everything."""
    records, config = read_records(run), read_config(run)
    found = columns(records)
    drawn = {
        name: [(chart.more, html) for chart in charts(name, found) if (html := draw(chart, found))]
        for name in ("learning", "routing", "speed")
    }
    sections = {name: render("charts.html", name=name, charts=made) if made else "" for name, made in drawn.items()}
    values = tables.explained(records)
    sections["values"] = render("values.html", values=values) if values else ""
    sections["tiles"] = render("tiles.html", tiles=tables.tiles(records, config))
    return Built(sections=sections, data={"curves": found.document()})


def samples_part(run: Path) -> Built:
    grids = folder.by_step(run / folder.SAMPLES, suffix=".png")
    shown = evenly(grids, MAX_GRIDS)
    left_out = f"{len(shown)} of {len(grids)} grids, evenly chosen." if len(shown) < len(grids) else ""
    figures = [_sample(step, path) for step, path in shown]
    return Built(sections={"samples": render("samples.html", figures=figures, left_out=left_out) if figures else ""})


def routing_part(run: Path, *, still: bool = True) -> Built:
    """The explorer. `still`: with figures for paper and for readers without scripts."""
    maps = pack(run)
    if maps is None:
        return Built(sections={"explorer": ""}, data={"maps": None})
    html = render("explorer.html", note=maps["note"], still=_still(run) if still else None)
    return Built(sections={"explorer": html}, data={"maps": maps})


def allocation_part(run: Path) -> Built:
    """What objects and background get, of the newest file that `ecdit allocation` wrote."""
    found = folder.by_step(run / folder.ALLOCATION, suffix=".json")
    about = read_json(found[-1][1]) if found else {}
    return Built(sections={"allocation": allocation_section.html(about) if about else ""})


def evaluation_part(run: Path) -> Built:
    found = [tables.evaluation(path) for path in sorted((run / folder.EVALUATION).glob("*.json"))]
    return Built(sections={"evaluation": render("evaluation.html", found=found) if found else ""})


def configuration_part(run: Path) -> Built:
    path = run / folder.RESOLVED
    if not path.exists():
        return Built(sections={"configuration": ""})
    resolved = redact_text(path.read_text(encoding="utf-8", errors="replace"))
    html = render("configuration.html", summary=tables.summary(read_config(run)), resolved=resolved)
    return Built(sections={"configuration": html})


PARTS: Mapping[str, Callable[[Path], Built]] = {
    "records": records_part,
    "samples": samples_part,
    "routing": routing_part,
    "allocation": allocation_part,
    "evaluation": evaluation_part,
    "configuration": configuration_part,
}


def shown(name: str, run: Path, part: Callable[[Path], Built]) -> Built:
    """A part, or one line in its place: one damaged file, which may be anything, takes no other part away."""
    try:
        return part(run)
    except Exception as error:
        words = f"{type(error).__name__}: {error}"
        logger.warning("%s of %s cannot be shown: %s", name, run, words, exc_info=not isinstance(error, OSError))
        html = render("broken.html", words=redact_text(words))
        return Built(sections={MAIN.get(name, name): html}, broken=True)


def files_of(part: str, run: Path) -> Iterable[Path]:
    """What a part is made of: it is made anew when one of these changes, comes or goes."""
    patterns = {
        "records": (f"{folder.METRICS}/*.jsonl", folder.METRICS_FILE, folder.RESOLVED),
        "samples": (f"{folder.SAMPLES}/step_*",),
        "routing": (f"{folder.ROUTING}/*",),
        "allocation": (f"{folder.ALLOCATION}/step_*.json",),
        "evaluation": (f"{folder.EVALUATION}/*.json",),
        "configuration": (folder.RESOLVED,),
    }
    return (path for pattern in patterns[part] for path in run.glob(pattern))


MAIN = {"records": "learning", "routing": "explorer"}
"""The section in which a part says what is wrong with it, where it has another name."""


# --- pictures --------------------------------------------------------------------------------------------------------

_HOW = {
    "sampler": "{}",
    "steps": "{} steps",
    "guidance": "guidance {}",
    "seed": "seed {}",
    "scope": "routing scope {}",
}


def _image(png: bytes, *, alt: str, label: str = "", caption: str = "") -> dict[str, Any]:
    """A PNG as templates take it."""
    return {"png": base64.b64encode(png).decode(), "alt": alt, "label": label, "caption": caption}


def _sample(step: int, path: Path) -> dict[str, Any]:
    about = read_json(path.with_suffix(".json"))
    how = [form.format(about[k]) for k, form in _HOW.items() if about.get(k) is not None]
    prompts = [str(p) for p in about.get("prompts", [])]
    alt = f"samples at step {step}: {'; '.join(prompts)}"
    caption = ", ".join([f"step {step:,}", *how])
    return {**_image(path.read_bytes(), alt=alt, label=f"step {step:,}", caption=caption), "prompts": prompts}


def _still(run: Path) -> list[dict[str, Any]]:
    """Heatmaps of the newest sound routing maps, one a prompt and one of all layers."""
    for _, path in reversed(folder.by_step(run / folder.ROUTING, suffix=".npz")):
        try:
            maps = RoutingMaps.load(path)
        except RunFolderError:
            continue
        panels = len(maps.layers) * len(maps.timesteps)
        images = range(min(MAX_PROMPTS, len(maps.prompts), max(1, MAX_PANELS // panels)))
        figures = [
            (allocation_png(maps, image=b), f"experts per patch: {maps.prompts[b]}", maps.prompts[b]) for b in images
        ]
        with tempfile.TemporaryDirectory() as scratch:
            layers = allocation_layers(maps, Path(scratch) / "figure.png", images=images).read_bytes()
        figures.append((layers, "experts per patch, layer by layer", "every layer at one moment"))
        return [_image(png, alt=alt, label=label) for png, alt, label in figures]
    return []

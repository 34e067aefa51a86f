"""`report.html`: everything a run folder knows, in one file that opens without a network."""

from __future__ import annotations

import html
import logging
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from ecdit_train.errors import RunFolderError

from . import folder, parts
from .charts import PALETTE, Curve, line_chart, number
from .console import duration
from .figures import allocation_heatmap, allocation_layers, series, smooth
from .metrics import METRICS, metric_key
from .page import SCRIPT, STYLE
from .routing import RoutingMaps
from .redact import redact_text
from .sinks import read_jsonl

logger = logging.getLogger("ecdit.observe")

MAX_GRIDS = 60
"""Sample grids embedded; of a longer run an even choice, first and last included, so that the file stays sendable."""
MAX_MAPS = 6
"""Earlier routing maps shown small beside the latest."""
MAX_PROMPTS = 4
"""Prompts of the latest routing maps that get their own heatmaps."""
Records = Sequence[Mapping[str, Any]]


def write_report(run_folder: Path) -> Path:
    """Writes `<run>/report.html`, replacing it atomically; sections whose files are missing are left out."""
    if not run_folder.is_dir():
        raise RunFolderError(f"{run_folder}: no such run folder")
    records = read_jsonl(folder.metrics_path(run_folder))
    config = _config(run_folder)
    title = html.escape(run_folder.resolve().name)
    written = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    lead = f"{html.escape(str(config.get('experiment') or 'a run of ecdit'))}, report of {written}"
    body = [
        f'<header><h1>{title}</h1><p class="lead">{lead}</p>{_tiles(records, config)}</header>',
        _learning(records),
        _samples(run_folder),
        _allocation(run_folder),
        _routing_curves(records),
        _speed(records),
        _evaluation(run_folder),
        _last(records),
        _configuration(config, run_folder),
    ]
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><main>{''.join(body)}</main><script>{SCRIPT}</script></body></html>\n"
    )
    path = run_folder / folder.REPORT
    folder.write_atomically(path, page.encode())
    return path


# --- head ------------------------------------------------------------------------------------------------------------


def _config(run_folder: Path) -> Mapping[str, Any]:
    """resolved.yaml as plain dicts; empty when it is missing or unreadable (a report never fails for its header)."""
    from omegaconf import OmegaConf

    path = run_folder / folder.RESOLVED
    if not path.exists():
        return {}
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:
        logger.warning("%s is not readable: %s", path, error)
        return {}
    return cast("dict[str, Any]", tree) if isinstance(tree, dict) else {}


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _tiles(records: Records, config: Mapping[str, Any]) -> str:
    last = _last_values(records)
    tiles = []
    if records:
        total = (config.get("train") or {}).get("steps")
        tiles.append((number(records[-1]["step"]), f"of {number(total)} steps" if total else "steps"))
    for label, key, form in (
        ("training loss", "train/loss", number),
        ("images seen", "train/images", number),
        ("images per second", "perf/images_per_s", number),
        ("of the GPUs' peak", "perf/mfu", _percent),
        ("waiting for data", "data/stall_frac", _percent),
    ):
        if key in last:
            tiles.append((form(last[key]), label))
    if len(records) > 1:
        tiles.append((duration(records[-1].get("time", 0) - records[0].get("time", 0)), "first to last record"))
    body = "".join(f'<div class="tile"><b>{html.escape(value)}</b><span>{label}</span></div>' for value, label in tiles)
    return f'<div class="tiles">{body}</div>'


def _last_values(records: Records) -> dict[str, float]:
    """The newest number of every metric."""
    last: dict[str, float] = {}
    for record in records:
        last |= {k: v for k, v in record.items() if isinstance(v, (int, float)) and k not in ("step", "time")}
    return last


# --- curves ----------------------------------------------------------------------------------------------------------


def _curve(records: Records, key: str, *, label: str, color: int = 0, faint: bool = False) -> Curve:
    x, y = series(records, key)
    return Curve(label=label, x=x, y=y, color=PALETTE[color % len(PALETTE)], faint=faint)


def _learning(records: Records) -> str:
    steps, losses = series(records, "train/loss")
    loss = [
        Curve(label="raw", x=steps, y=losses, color=PALETTE[0], faint=True),
        Curve(label="training, smoothed", x=steps, y=smooth(losses), color=PALETTE[0]),
    ]
    norms = [
        _curve(records, "optim/grad_norm", label="mean", color=2),
        _curve(records, "optim/grad_norm_max", label="largest", color=3),
    ]
    rate = _curve(records, "optim/lr", label="learning rate", color=4)
    return parts.chart_section(
        "Learning",
        "The pale line is every log step, the strong one its moving average.",
        [
            line_chart(loss, title="Loss", unit="mean squared error", wide=True),
            line_chart(norms, title="Gradient norm", unit="before clipping"),
            line_chart([rate], title="Learning rate"),
        ],
    )


def _speed(records: Records) -> str:
    charts = []
    for n, (key, label, title) in enumerate(
        (
            ("perf/images_per_s", "images per second", "Throughput"),
            ("data/stall_frac", "waiting for data", "Data stall"),
            ("perf/mfu", "model FLOP utilisation", "Model FLOP utilisation"),
            ("perf/memory_gib", "memory", "Device memory"),
        )
    ):
        curve = _curve(records, key, label=label, color=n)
        charts.append(line_chart([curve], title=title, unit=METRICS[key].unit))
    return parts.chart_section("Speed", "Time spent in checkpoints and samples is left out.", charts)


def _routing_curves(records: Records) -> str:
    """One chart a quantity, one curve a layer."""
    layers = sorted({int(k.split("/")[1][1:]) for r in records for k in r if k.startswith("moe/L")})
    charts = []
    for name, title in (
        ("dropped_frac", "Tokens without an expert"),
        ("experts_per_token_std", "Spread of experts per token"),
        ("experts_per_token_max", "Largest number of experts of a token"),
        ("entropy", "Router entropy"),
        ("gate_mean", "Mean gate"),
        ("overflow_frac", "Choices beyond capacity"),
        ("load_cv", "Load imbalance"),
    ):
        curves = [_curve(records, f"moe/L{n}/{name}", label=f"layer {n}", color=i) for i, n in enumerate(layers)]
        charts.append(line_chart(curves, title=title, unit=METRICS[f"moe/{name}"].unit))
    note = "Experts take tokens; these curves say how evenly, how sure, and who is left out."
    return parts.chart_section("Routing over the run", note, charts)


# --- pictures --------------------------------------------------------------------------------------------------------

_HOW = {
    "sampler": "{}",
    "steps": "{} steps",
    "guidance": "guidance {}",
    "seed": "seed {}",
    "scope": "routing scope {}",
}


def _samples(run_folder: Path) -> str:
    found = folder.by_step(run_folder / folder.SAMPLES, suffix=".png")
    if not found:
        return ""
    slides = []
    for step, path in parts.evenly(found, MAX_GRIDS):
        about = parts.read_json(path.with_suffix(".json"))
        how = [form.format(about[k]) for k, form in _HOW.items() if about.get(k) is not None]
        slides.append(
            parts.slide(
                f"step {step:,}",
                parts.png(path, alt=f"samples at step {step}: {'; '.join(map(str, about.get('prompts', [])))}"),
                caption=", ".join([f"step {step:,}", *how]),
            )
        )
    left_out = f" {len(slides)} of {len(found)} grids, evenly chosen." if len(slides) < len(found) else ""
    return parts.section(
        "Samples",
        f"The same prompts and the same noise at every step; move the slider through the run.{left_out}",
        parts.slides(slides, name="training step", start=len(slides) - 1, play=True),
    )


def _allocation(run_folder: Path) -> str:
    found = folder.by_step(run_folder / folder.ROUTING, suffix=".npz")
    loaded: list[tuple[int, RoutingMaps]] = []
    for step, path in [*parts.evenly(found[:-1], MAX_MAPS), *found[-1:]]:
        try:
            loaded.append((step, RoutingMaps.load(path)))
        except RunFolderError as error:
            logger.warning("left out of the report: %s", error)
    if not loaded:
        return ""
    step, latest = loaded[-1]
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "figure.png"
        images = range(min(MAX_PROMPTS, len(latest.prompts)))
        large = [
            parts.slide(
                f"prompt {b + 1}",
                parts.png(allocation_heatmap(latest, file, image=b), alt=f"experts per patch: {latest.prompts[b]}"),
            )
            for b in images
        ]
        across = parts.png(allocation_layers(latest, file, images=images), alt="experts per patch, layer by layer")
        earlier = [
            f"<figure>{parts.png(allocation_heatmap(maps, file, columns=3), alt=f'experts per patch at step {s}')}"
            f"<figcaption>step {s:,}</figcaption></figure>"
            for s, maps in loaded[:-1]
        ]
    note = (
        f"How many experts took each patch at step {step:,}, over the finished picture. Rows are sparse layers, "
        "columns the time of the flow: t = 0 is noise, t = 1 the picture. Darker is more compute."
    )
    small = f'<h3>Earlier in the run</h3><div class="small">{"".join(earlier)}</div>' if earlier else ""
    body = f"{parts.slides(large, name='prompt', start=0)}<h3>Every layer at one moment</h3>{across}{small}"
    return parts.section("Where the experts work", note, body)


# --- tables ----------------------------------------------------------------------------------------------------------


def _evaluation(run_folder: Path) -> str:
    body = []
    for path in sorted((run_folder / folder.EVALUATION).glob("*.json")):
        values = parts.read_json(path)
        body.append(f"<h3>{html.escape(path.stem)}</h3>")
        flat = {k: v for k, v in values.items() if not isinstance(v, dict)}
        nested = {k: v for k, v in values.items() if isinstance(v, dict)}
        if flat:
            body.append(parts.table(flat))
        if any(isinstance(x, dict) for v in nested.values() for x in v.values()):
            body += [f"<h3>{html.escape(k)}</h3>{parts.table(v)}" for k, v in nested.items()]
        elif nested:
            body.append(parts.table(nested))
    return parts.section("Evaluation", "Results stored in the run folder.", "".join(body))


def _last(records: Records) -> str:
    last = {k: v for k, v in _last_values(records).items() if "/L" not in k}
    lines = []
    for key in sorted(last):
        about = METRICS.get(metric_key(key))
        unit, question = (about.unit, about.question) if about else ("", "")
        lines.append(
            [
                f"<code>{html.escape(key)}</code>",
                parts.cell(last[key]),
                f"<small>{html.escape(unit)}</small>",
                f"<small>{html.escape(question)}</small>",
            ]
        )
    body = parts.rows(["metric", "last value", "unit", "what it tells"], lines) if lines else ""
    return parts.section("Last values", "Per-layer routing values are in the curves above.", body)


_SUMMARY = {
    "model": ("name", "layers", "width", "heads", "patch"),
    "moe": ("router", "experts", "capacity_factor", "scope", "group_size"),
    "diffusion": ("prediction", "mask_ratio", "caption_drop"),
    "data": ("shards", "resolution"),
    "train": ("steps", "global_batch", "microbatch", "precision", "seed"),
    "optim": ("kind", "lr", "warmup_steps", "schedule", "clip_norm", "ema_decay"),
    "parallel": ("dp_replicate", "dp_shard", "tp", "ep"),
}


def _configuration(config: Mapping[str, Any], run_folder: Path) -> str:
    path = run_folder / folder.RESOLVED
    if not path.exists():
        return ""
    summary = []
    for name, keys in _SUMMARY.items():
        values = config.get(name) or {}
        text = ", ".join(f"{k} {values[k]}" for k in keys if k in values)
        if text:
            summary.append(f"<dt>{name}</dt><dd>{html.escape(redact_text(text))}</dd>")
    whole = html.escape(redact_text(path.read_text(encoding="utf-8", errors="replace")))
    return parts.section(
        "Configuration",
        "The short version; the whole file is below.",
        f"<dl>{''.join(summary)}</dl><details><summary>resolved.yaml</summary><pre>{whole}</pre></details>",
    )

"""`report.html`: everything a run folder knows, in one file that opens without a network."""

from __future__ import annotations

import base64
import json
import logging
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from ecdit_train import atomic
from ecdit_train import run_folder as folder
from ecdit_train.errors import RunFolderError

from .charts import PALETTE, Curve, line_chart, series, smooth
from .console import duration
from .figures import allocation_heatmap, allocation_layers
from .journal import read_records
from .metrics import METRICS, Metric, metric_key
from .page import render, short
from .redact import redact_text
from .routing import RoutingMaps

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
    records, config = read_records(run_folder), _config(run_folder)
    grids = folder.by_step(run_folder / folder.SAMPLES, suffix=".png")
    shown = _evenly(grids, MAX_GRIDS)
    resolved = run_folder / folder.RESOLVED
    page = render(
        "report.html",
        title=run_folder.resolve().name,
        written=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        config={"experiment": None, **config},
        tiles=_tiles(records, config),
        learning=_learning(records),
        samples=[_sample(step, path) for step, path in shown],
        left_out=f" {len(shown)} of {len(grids)} grids, evenly chosen." if len(shown) < len(grids) else "",
        allocation=_allocation(run_folder),
        routing=_routing(records),
        speed=_speed(records),
        evaluation=[_evaluation(path) for path in sorted((run_folder / folder.EVALUATION).glob("*.json"))],
        last=_last(records),
        summary=_summary(config),
        resolved=redact_text(resolved.read_text(encoding="utf-8", errors="replace")) if resolved.exists() else None,
    )
    path = run_folder / folder.REPORT
    atomic.write(path, page.encode())
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


def _tiles(records: Records, config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(value, what it is)."""
    last, tiles = _last_values(records), []
    if records:
        total = (config.get("train") or {}).get("steps")
        tiles.append((short(records[-1]["step"]), f"of {short(total)} steps" if total else "steps"))
    for label, key, form in (
        ("training loss", "train/loss", short),
        ("images seen", "train/images", short),
        ("images per second", "perf/images_per_s", short),
        ("of the GPUs' peak", "perf/mfu", "{:.1%}".format),
        ("waiting for data", "data/stall_frac", "{:.1%}".format),
    ):
        if key in last:
            tiles.append((form(last[key]), label))
    if len(records) > 1:
        tiles.append((duration(records[-1].get("time", 0) - records[0].get("time", 0)), "first to last record"))
    return tiles


def _last_values(records: Records) -> dict[str, float]:
    """The newest number of every metric."""
    last: dict[str, float] = {}
    for record in records:
        last |= {k: v for k, v in record.items() if isinstance(v, (int, float)) and k not in ("step", "time")}
    return last


# --- curves ----------------------------------------------------------------------------------------------------------


def _chart(records: Records, keys: Mapping[str, str], *, title: str, unit: str = "", color: int = 0) -> str:
    """One curve per key (metric -> label), colours from `color` on."""
    curves = []
    for n, (key, label) in enumerate(keys.items(), start=color):
        x, y = series(records, key)
        curves.append(Curve(label=label, x=x, y=y, color=PALETTE[n % len(PALETTE)]))
    return line_chart(curves, title=title, unit=unit)


_UNKNOWN = Metric(unit="", reduction="last", question="")
_ROUTING = {
    "dropped_frac": "Tokens without an expert",
    "experts_per_token_std": "Spread of experts per token",
    "experts_per_token_max": "Largest number of experts of a token",
    "entropy": "Router entropy",
    "gate_mean": "Mean gate",
    "overflow_frac": "Choices beyond capacity",
    "capped_frac": "Rows beyond the cap",
    "load_cv": "Load imbalance",
}


def _learning(records: Records) -> list[str]:
    steps, losses = series(records, "train/loss")
    raw = Curve(label="raw", x=steps, y=losses, color=PALETTE[0], faint=True)
    smoothed = Curve(label="training, smoothed", x=steps, y=smooth(losses), color=PALETTE[0])
    losses_of_routers = sorted({k for r in records for k in r if k.startswith("train/") and k.endswith("_loss")})
    norms = {"optim/grad_norm": "mean", "optim/grad_norm_max": "largest"}
    charts = [
        line_chart([raw, smoothed], title="Loss", unit="mean squared error", wide=True),
        _chart(records, norms, title="Gradient norm", unit="before clipping", color=2),
        _chart(records, {"optim/lr": "learning rate"}, title="Learning rate", color=4),
        _chart(
            records, {key: key for key in losses_of_routers}, title="Auxiliary losses", unit="weight included", color=5
        ),
    ]
    return [chart for chart in charts if chart]


def _speed(records: Records) -> list[str]:
    about = (
        ("perf/images_per_s", "images per second", "Throughput"),
        ("data/stall_frac", "waiting for data", "Data stall"),
        ("perf/mfu", "model FLOP utilisation", "Model FLOP utilisation"),
        ("mem/allocated_gib", "memory", "Device memory"),
    )
    charts = [
        _chart(records, {key: label}, title=title, unit=METRICS[key].unit, color=n)
        for n, (key, label, title) in enumerate(about)
    ]
    return [chart for chart in charts if chart]


def _routing(records: Records) -> list[str]:
    """One chart a quantity, one curve a layer; what a router of one's own reports comes last."""
    logged = {k for r in records for k in r if k.startswith("moe/L")}
    layers = sorted({int(k.split("/")[1][1:]) for k in logged})
    titles = _ROUTING | {n: n.replace("_", " ") for n in sorted({k.split("/")[2] for k in logged} - _ROUTING.keys())}
    charts = []
    for name, title in titles.items():
        keys, about = (
            {f"moe/L{n}/{name}": f"layer {n}" for n in layers},
            METRICS.get(metric_key(f"moe/{name}"), _UNKNOWN),
        )
        charts.append(_chart(records, keys, title=title, unit=about.unit))
    return [chart for chart in charts if chart]


# --- pictures --------------------------------------------------------------------------------------------------------

_HOW = {
    "sampler": "{}",
    "steps": "{} steps",
    "guidance": "guidance {}",
    "seed": "seed {}",
    "scope": "routing scope {}",
}


def _image(path: Path, *, alt: str, label: str = "", caption: str = "") -> dict[str, str]:
    """A PNG as the template's `image` and `slides` take it."""
    png = base64.b64encode(path.read_bytes()).decode()
    return {"png": png, "alt": alt, "label": label, "caption": caption}


def _sample(step: int, path: Path) -> dict[str, str]:
    about = _read_json(path.with_suffix(".json"))
    how = [form.format(about[k]) for k, form in _HOW.items() if about.get(k) is not None]
    alt = f"samples at step {step}: {'; '.join(map(str, about.get('prompts', [])))}"
    return _image(path, alt=alt, label=f"step {step:,}", caption=", ".join([f"step {step:,}", *how]))


def _allocation(run_folder: Path) -> dict[str, Any] | None:
    """Heatmaps of the newest routing maps, one a prompt and one of all layers, and of some earlier ones; None without."""
    found = folder.by_step(run_folder / folder.ROUTING, suffix=".npz")
    loaded: list[tuple[int, RoutingMaps]] = []
    for step, path in [*_evenly(found[:-1], MAX_MAPS), *found[-1:]]:
        try:
            loaded.append((step, RoutingMaps.load(path)))
        except RunFolderError as error:
            logger.warning("left out of the report: %s", error)
    if not loaded:
        return None
    step, latest = loaded[-1]
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "figure.png"
        images = range(min(MAX_PROMPTS, len(latest.prompts)))
        return {
            "step": f"{step:,}",
            "prompts": [
                _image(
                    allocation_heatmap(latest, file, image=b),
                    alt=f"experts per patch: {latest.prompts[b]}",
                    label=f"prompt {b + 1}",
                )
                for b in images
            ],
            "layers": _image(allocation_layers(latest, file, images=images), alt="experts per patch, layer by layer"),
            "earlier": [
                _image(
                    allocation_heatmap(maps, file, columns=3),
                    alt=f"experts per patch at step {s}",
                    label=f"step {s:,}",
                )
                for s, maps in loaded[:-1]
            ],
        }


# --- tables ----------------------------------------------------------------------------------------------------------

Table = tuple[list[str], list[list[Any]]]
"""Header, and lines of cells."""


def _evaluation(path: Path) -> list[tuple[str, list[Table]]]:
    """(heading, tables) of one result: plain values, then one table a section, or one of all where they are alike."""
    values = _read_json(path)
    flat = {k: v for k, v in values.items() if not isinstance(v, dict)}
    nested = {k: v for k, v in values.items() if isinstance(v, dict)}
    deep = any(isinstance(x, dict) for v in nested.values() for x in v.values())
    own = [_table(part) for part in (flat, {} if deep else nested) if part]
    return [(path.stem, own), *((k, [_table(v)]) for k, v in nested.items() if deep)]


def _table(values: Mapping[str, Any]) -> Table:
    """Name and value; with a column per field where every value is a dict."""
    if values and all(isinstance(v, dict) for v in values.values()):
        columns = list(dict.fromkeys(c for v in values.values() for c in v))
        return ["", *columns], [[k, *(v.get(c, "") for c in columns)] for k, v in values.items()]
    return ["", "value"], [[k, v] for k, v in values.items()]


def _last(records: Records) -> list[tuple[str, float, Metric]]:
    last = {k: v for k, v in _last_values(records).items() if "/L" not in k}
    return [(key, last[key], METRICS.get(metric_key(key), _UNKNOWN)) for key in sorted(last)]


_SUMMARY = {
    "model": ("name", "layers", "width", "heads", "patch"),
    "moe": ("router", "num_experts", "experts", "capacity_factor", "dispatcher", "scope", "group_size"),
    "diffusion": ("prediction", "mask_ratio", "caption_drop"),
    "data": ("shards", "resolution"),
    "train": ("steps", "global_batch", "microbatch", "precision", "seed"),
    "optim": ("optimizer", "kind", "lr", "warmup_steps", "schedule", "clip_norm", "ema_decay"),
    "parallel": ("dp_replicate", "dp_shard", "tp", "ep"),
}


def _summary(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(section, its most telling values)."""
    chosen = {name: (config.get(name) or {}, keys) for name, keys in _SUMMARY.items()}
    texts = {
        n: ", ".join(f"{k} {_said(values[k])}" for k in keys if k in values) for n, (values, keys) in chosen.items()
    }
    return [(name, redact_text(text)) for name, text in texts.items() if text]


def _said(value: Any) -> str:
    """A slot as its class with its values, anything else as it is."""
    if not isinstance(value, dict):
        return str(value)
    name = str(value.get("_target_", "")).rpartition(".")[2]
    own = ", ".join(f"{k} {v}" for k, v in value.items() if k != "_target_" and v is not None)
    return f"{name} ({own})" if own else name


# --- files -----------------------------------------------------------------------------------------------------------


def _read_json(path: Path) -> Mapping[str, Any]:
    """A JSON object; empty when the file is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _evenly(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of them in order, first and last included."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]

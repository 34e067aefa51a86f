"""What a report says in words and numbers: tiles, last values, evaluation results, the configuration in short."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from ecdit_train.run_folder import RESOLVED

from .console import duration
from .curves import UNKNOWN, Records
from .metrics import METRICS, Metric, metric_key
from .page import short
from .redact import redact_text

logger = logging.getLogger("ecdit.observe")

Table = tuple[list[str], list[list[Any]]]
"""Header, and lines of cells."""


def read_config(run_folder: Path) -> Mapping[str, Any]:
    """resolved.yaml as plain dicts; empty when it is missing or unreadable (a report never fails for its header)."""
    from omegaconf import OmegaConf

    path = run_folder / RESOLVED
    if not path.exists():
        return {}
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:
        logger.warning("%s is not readable: %s", path, error)
        return {}
    return cast("dict[str, Any]", tree) if isinstance(tree, dict) else {}


def tiles(records: Records, config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(value, what it is)."""
    last, found = last_values(records), []
    if records:
        total = (config.get("train") or {}).get("steps")
        found.append((short(records[-1]["step"]), f"of {short(total)} steps" if total else "steps"))
    for label, key, form in (
        ("training loss", "train/loss", short),
        ("validation loss", "eval/loss", short),
        ("images seen", "train/images", short),
        ("images per second", "perf/images_per_s", short),
        ("of the GPUs' peak", "perf/mfu", "{:.1%}".format),
        ("waiting for data", "data/stall_frac", "{:.1%}".format),
    ):
        if key in last:
            found.append((form(last[key]), label))
    if len(records) > 1:
        found.append((duration(records[-1].get("time", 0) - records[0].get("time", 0)), "first to last record"))
    return found


def last_values(records: Records) -> dict[str, float]:
    """The newest number of every metric."""
    last: dict[str, float] = {}
    for record in reversed(records):
        for key, value in record.items():
            if key not in last and isinstance(value, int | float) and key not in ("step", "time"):
                last[key] = value
    return last


def explained(records: Records) -> list[tuple[str, float, Metric]]:
    """(metric, its last value, what it tells), without single layers."""
    last = {k: v for k, v in last_values(records).items() if "/L" not in k}
    return [(key, last[key], METRICS.get(metric_key(key), UNKNOWN)) for key in sorted(last)]


def evaluation(path: Path) -> list[tuple[str, list[Table]]]:
    """(heading, tables) of one result: plain values, then one table a section, or one of all where they are alike."""
    values = read_json(path)
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


_SUMMARY = {
    "model": ("name", "layers", "width", "heads", "patch"),
    "moe": ("router", "num_experts", "experts", "capacity_factor", "dispatcher", "scope", "group_size"),
    "diffusion": ("prediction", "mask_ratio", "caption_drop"),
    "data": ("shards", "resolution"),
    "train": ("steps", "global_batch", "microbatch", "precision", "seed"),
    "optim": ("optimizer", "kind", "lr", "warmup_steps", "schedule", "clip_norm", "ema_decay"),
    "parallel": ("dp_replicate", "dp_shard", "tp", "ep"),
}


def summary(config: Mapping[str, Any]) -> list[tuple[str, str]]:
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


def read_json(path: Path) -> Mapping[str, Any]:
    """A JSON object; empty when the file is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}

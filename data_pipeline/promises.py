"""What a tar's writer said of it, held against what is there. img2dataset leaves `00000_stats.json` beside `00000.tar` (how many
samples it wrote) and a `sha256` of the picture in each sample's json."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from data_pipeline.gather import Gathered, Sample
from data_pipeline.tar import Buffer, Damage

PICTURES = ("jpg", "jpeg", "png", "webp")


def check_promises(tar: Path, *, found: Gathered, buffer: Buffer) -> None:
    """Adds to `found`: damage where samples are missing, rejected samples where a picture is not the one that was written."""
    told = promised(tar)
    there = len(found.samples) + found.rejected.total()
    if told is not None and told != there and not found.damage:
        words = f"{stats_path(tar).name} counts {told} samples, {there} are here"
        found.damage.append(Damage(kind="count", start=len(buffer), end=len(buffer), words=words))
    checked = {id(sample): same for sample in found.samples if (same := _as_told(sample, buffer)) is not None}
    # img2dataset hashes what it downloaded; where it resized, no sum agrees, and none says anything.
    if 2 * sum(checked.values()) > len(checked):
        kept = [sample for sample in found.samples if checked.get(id(sample), True)]
        found.rejected.update(["sha256 differs"] * (len(found.samples) - len(kept)))
        found.samples = kept


def stats_path(tar: Path) -> Path:
    return tar.with_name(f"{tar.stem}_stats.json")


def promised(tar: Path) -> int | None:
    """Samples that img2dataset says it wrote; None where it says nothing."""
    try:
        count = json.loads(stats_path(tar).read_bytes())["successes"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return count if isinstance(count, int) else None


def _as_told(sample: Sample, buffer: Buffer) -> bool | None:
    """Whether a picture has the sum that its json names; None where none is named."""
    about, picture = sample.fields.get("json"), next((sample.fields[p] for p in PICTURES if p in sample.fields), None)
    if about is None or picture is None:
        return None
    text = bytes(buffer[about.data : about.data + about.size])
    if b'"sha256"' not in text:
        return None
    try:
        told = json.loads(text)["sha256"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if not isinstance(told, str) or len(told) != 64:
        return None
    return hashlib.sha256(buffer[picture.data : picture.data + picture.size]).hexdigest() == told.lower()

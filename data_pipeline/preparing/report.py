"""One HTML file that shows a data set: what became of every sample, sizes, pictures with captions, duplicates."""

from __future__ import annotations

import base64
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline import stats
from data_pipeline.assemble import IMAGE_SUFFIXES
from data_pipeline.commit import write_committed
from data_pipeline.decode import decode_upright
from data_pipeline.errors import DataError, Where
from data_pipeline.manifest import View
from data_pipeline.preparing.dedup import Duplicates
from data_pipeline.preparing.facts import FactsWork, rows
from data_pipeline.preparing.pack import caption_of
from data_pipeline.preparing.page import render
from data_pipeline.preparing.pixels import encode_image, shrunk
from data_pipeline.preparing.sources import Found
from data_pipeline.preparing.work import read_record
from data_pipeline.reader import ShardReader

PICTURES = 60
"""On the contact sheet."""
CLUSTERS, OF_EACH = 12, 8
"""Of duplicates, and how many of each are shown."""
SIDE = 160
"""Longer side of a picture in the report."""
BARS = 24


@dataclass(frozen=True, kw_only=True)
class Fate:
    """What became of some samples."""

    what: str
    count: int
    example: str = ""
    percent: float = 0.0
    kept: bool = False


def write_report(work: FactsWork, *, out: Path, duplicates: Duplicates | None = None) -> Path:
    """Write the report of a data set whose tables `select.make_facts` has made.

    Args:
        duplicates: what `dedup.find_duplicates` said; None where nobody looked.
    """
    view, look = work.source.view, stats.look(work.source.folder)
    fates, damage, origin = _fates(view, look)
    shown = _Shown(view)
    values = {name: np.array(found) for name, found in _values(work).items()}
    page = render(
        "data_report.html",
        title=work.source.folder.resolve().name,
        sha=view.sha256[:12],
        written=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        tiles=[
            (f"{view.num_samples:,}", "samples"),
            (f"{len(view.shards):,}", "shards"),
            (_bytes(look.bytes), "in tars"),
            (f"{sum(fate.count for fate in fates if not fate.kept):,}", "rejected samples"),
            *([(f"{int((~duplicates.mask).sum()):,}", "duplicates")] if duplicates is not None else []),
        ],
        fates=fates,
        damage=damage,
        origin=origin,
        measured=f"{max((len(found) for found in values.values()), default=0):,}",
        charts=[
            _chart(title, values[name], bytes_=name == "bytes") for name, title in _CHARTS.items() if len(values[name])
        ],
        fields=[(name, f"{count:,}", f"{mean:,.0f}") for name, (count, mean) in look.fields.items()],
        sheet=list(shown.sheet()),
        duplicates=_say_duplicates(duplicates),
        clusters=list(shown.clusters(duplicates)) if duplicates is not None else [],
    )
    write_committed(page.encode("utf-8", "replace"), out)
    return out


_CHARTS = {
    "short": "Shorter side, pixels",
    "aspect": "Longer side / shorter side",
    "caption_length": "Letters of the caption",
    "bytes": "Bytes of the picture",
    "original": "Shorter side before it was packed, pixels",
}


def _values(work: FactsWork) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in _CHARTS}
    for task in work.tasks():
        for row in rows(task.output):
            if row["problem"] is not None:
                continue
            found["caption_length"].append(row["caption_length"] or 0)
            if row["width"]:
                found["short"].append(min(row["width"], row["height"]))
                found["aspect"].append(row["aspect"])
                found["bytes"].append(row["bytes"])
            packed = row.get("pack")
            if isinstance(packed, dict) and isinstance(packed.get("original"), list):
                found["original"].append(min(packed["original"]))
    return found


def _fates(view: View, look: stats.Stats) -> tuple[list[Fate], list[str], str]:
    """From the done records where we made the shards, else from what indexing counted."""
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    damage: list[str] = []
    records = 0
    for number in range(len(view.shards)):
        try:
            record = read_record(view.tar(number).with_name(f"{view.tar(number).name.partition('.')[0]}.done.json"))
        except (OSError, ValueError, KeyError, TypeError):
            continue
        records += 1
        counts.update(record.rejected)
        damage += record.damage
        for why, named in record.examples.items():
            examples.setdefault(why, next(iter(named), ""))
    origin = f"As counted when {records:,} of {len(view.shards):,} shards were made: taken = kept + rejected."
    if not records:
        for tally in look.tallies.values():
            counts.update(tally.rejected)
        damage += [f"{name}: {tally.set_aside}" for name, tally in look.tallies.items() if tally.set_aside]
        origin = "As counted when its tars were indexed."
    whole = max(view.num_samples + counts.total(), 1)
    fates = [Fate(what="kept", count=view.num_samples, percent=round(100 * view.num_samples / whole, 2), kept=True)]
    for why, count in counts.most_common():
        fates.append(Fate(what=why, count=count, example=examples.get(why, ""), percent=round(100 * count / whole, 2)))
    return fates, damage[:50], origin


def _chart(title: str, values: np.ndarray, *, bytes_: bool) -> Mapping[str, Any]:
    low, high = float(values.min()), float(np.quantile(values, 0.995))
    if high <= low:
        high = max(float(values.max()), low + 1)
    edges = np.linspace(low, high, BARS + 1)
    counts, _ = np.histogram(np.minimum(values, high), bins=edges)
    tell = _bytes if bytes_ else _number
    most = max(int(counts.max()), 1)
    bars = []
    for number, count in enumerate(counts.tolist()):
        height = round(100 * count / most, 2)
        words = f"{tell(float(edges[number]))} to {tell(float(edges[number + 1]))}: {count:,}"
        bars.append({"x": 10 * number, "y": round(100 - height, 2), "height": height, "title": words})
    median = float(np.median(values))
    return {"title": title, "bars": bars, "low": tell(low), "high": tell(high), "median": tell(median)}


class _Shown:
    """Samples as small pictures."""

    def __init__(self, view: View) -> None:
        self._view, self._reader = view, ShardReader(view)
        self._starts = np.cumsum([0, *view.shard_sizes])

    def sheet(self) -> Iterator[Mapping[str, str]]:
        number = self._view.num_samples
        for position in np.unique(np.linspace(0, number - 1, min(PICTURES, number)).astype(np.int64)).tolist():
            if (one := self._one(position)) is not None:
                yield one

    def clusters(self, duplicates: Duplicates) -> Iterator[Mapping[str, Any]]:
        for number, cluster in enumerate(duplicates.clusters()):
            if number == CLUSTERS:
                return
            shown = [one for position in cluster[:OF_EACH].tolist() if (one := self._one(position)) is not None]
            yield {"shown": shown, "more": max(len(cluster) - OF_EACH, 0)}

    def _one(self, position: int) -> Mapping[str, str] | None:
        shard = int(np.searchsorted(self._starts, position, side="right")) - 1
        name = self._view.shards[shard].name
        try:
            raw = self._reader.read(shard, sample=position - int(self._starts[shard]))
            where = Where(name, raw.key)
            picture = next((suffix for suffix in IMAGE_SUFFIXES if suffix in raw.payloads), None)
            if picture is None:
                return None
            pixels = decode_upright(raw.payloads[picture], least=SIDE, where=where).pixels
            jpeg = encode_image(shrunk(pixels, longest=SIDE), image_format="jpg", quality=82)
            found = Found(key=raw.key, fields=raw.payloads)
            caption = caption_of(found, [f for f in ("txt", "json") if f in raw.payloads], where=where) or ""
        except DataError:
            return None
        caption = caption if len(caption) <= 160 else caption[:159] + "\u2026"
        return {"jpeg": base64.b64encode(jpeg).decode(), "caption": caption, "key": f"{name} {raw.key}"}


def _say_duplicates(found: Duplicates | None) -> str:
    if found is None:
        return "Nobody has looked for them: ecdit data dedup."
    near = f"{found.near:,} that are nearly one"
    return (
        f"{found.exact:,} samples with the pixels of an earlier one, {near}. The first of each cluster, framed, is the one that "
        f"a keep-bitmap of `ecdit data dedup` keeps."
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value - round(value)) < 0.005 or abs(value) >= 100 else f"{value:,.2f}"


def _bytes(value: float) -> str:
    units: Sequence[str] = ("B", "KB", "MB", "GB", "TB", "PB")
    for unit in units:
        if value < 1000 or unit == units[-1]:
            return f"{value:,.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError

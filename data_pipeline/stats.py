"""What a data set holds, in numbers: from its manifest and indexes, without reading a tar."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.errors import BadSplit
from data_pipeline.index import ABSENT
from data_pipeline.indexing import tallies_of
from data_pipeline.manifest import open_view
from data_pipeline.mixture import Mixture
from data_pipeline.sources import DataSet
from data_pipeline.tally import Tally, table


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Sums over a folder."""

    shards: int
    samples: int
    bytes: int
    per_shard: tuple[int, int, int]
    """samples: fewest, median, most"""
    fields: Mapping[str, tuple[int, float]]
    """field -> (samples that have it, their mean size in bytes)"""
    forms: Mapping[tuple[str, ...], int]
    """fields of a sample -> how many have just these"""
    tallies: Mapping[str, Tally]


def look(folder: Path | str) -> Stats:
    """Raises what `manifest.open_view` raises."""
    view = open_view(folder)
    have: Counter[str] = Counter()
    size: Counter[str] = Counter()
    forms: Counter[tuple[str, ...]] = Counter()
    for number in range(len(view.shards)):
        index = view.load_index(number)
        there = index.length != ABSENT
        for column, name in enumerate(index.fields):
            have[name] += int(there[:, column].sum())
            size[name] += int(index.length[there[:, column], column].sum(dtype=np.int64))
        rows, counts = np.unique(there, axis=0, return_counts=True)
        for row, count in zip(rows, counts, strict=True):
            forms[tuple(sorted(name for name, has in zip(index.fields, row, strict=True) if has))] += int(count)
    sizes = sorted(view.shard_sizes.tolist())
    return Stats(
        shards=len(view.shards), samples=view.num_samples, bytes=view.num_bytes,
        per_shard=(sizes[0], sizes[len(sizes) // 2], sizes[-1]) if sizes else (0, 0, 0),
        fields={name: (have[name], size[name] / have[name]) for name in view.fields if have[name]},
        forms=dict(forms.most_common()), tallies=tallies_of(view),
    )  # fmt: skip


def _epoch(samples: int, *, global_batch: int) -> str:
    if not 1 <= global_batch <= samples:
        raise BadSplit(f"global batch {global_batch}: must be 1 to the number of samples, {samples}")
    left = samples % global_batch
    return f"an epoch     {samples // global_batch:>12,} steps of {global_batch:,}; {left:,} samples are left out, others in each"


def text(stats: Stats, *, global_batch: int | None = None) -> str:
    """For people. Raises BadSplit where there are fewer samples than one global batch."""
    fewest, median, most = stats.per_shard
    lines = [
        *table(stats.tallies),
        f"bytes        {stats.bytes:>12,}",
        f"per shard    {fewest:,} to {most:,} samples, median {median:,}",
        *([] if global_batch is None else [_epoch(stats.samples, global_batch=global_batch)]),
        "",
        "field              samples     share    mean bytes",
    ]
    for name, (count, mean) in stats.fields.items():
        lines.append(f"{name:<14}{count:>12,}{100 * count / stats.samples:>9.2f} %{mean:>14,.0f}")
    if len(stats.forms) > 1:
        lines += ["", "samples by their fields"]
        lines += [f"{count:>12,}  {' '.join(form)}" for form, count in stats.forms.items()]
    return "\n".join(lines)


def of_run(data: DataSet, *, global_batch: int, held_out: int = 0) -> str:
    """What a run reads of its sources, for people: what is used, shares, and what an epoch is and leaves out.

    Raises BadSplit for sizes and weights that do not go together.
    """
    stream = data.stream(seed=0, global_batch=global_batch, held_out=held_out)
    lines = ["source             samples          used     share   of a batch         epoch      left out"]
    if isinstance(stream, Mixture):
        cycle = stream.cycle
        # An epoch of a source, in steps of the run: of its `N_i` samples a cycle of T steps.
        each = [(one.share, stream.epoch_steps(i), one.left_out) for i, one in enumerate(stream.progress(0))]
        rounded = cycle.shares.rounded
    else:
        each, rounded = [(1.0, float(stream.steps_per_epoch), stream.dropped_per_epoch)], False
    for source, (share, steps, left_out) in zip(data.sources, each, strict=True):
        samples, used = source.view.num_samples, int(source.sizes.sum())
        lines.append(
            f"{source.name:<14}{samples:>12,}{used:>14,}{100 * share:>8.2f} %{share * global_batch:>13,.2f}"
            f"{steps:>8,.1f} steps{left_out:>14,}"
        )
    lines += ["", "used is without what data.keep drops; left out are samples of each epoch, others in each"]
    if rounded:
        lines.append("shares are rounded: as they are written they have no common period that is short enough")
    if held_out:
        lines.append(f"{held_out:,} samples are held out besides (validation.images)")
    if data.take_downs.lists:
        taken = sum(one.num_set for one in data.take_downs.lists)
        lines.append(f"{taken:,} samples are taken down: where they would come, others do")
    if data.buckets:
        lines += [
            "",
            *(f"{one.samples.num_set:>12,} samples at {one.height} x {one.width} ({one.name})" for one in data.buckets),
        ]
    return "\n".join(lines)

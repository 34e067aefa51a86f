"""What is said of a run's sources is what its stream does."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import stats
from data_pipeline.buckets import Bucket
from data_pipeline.errors import BadSplit
from data_pipeline.manifest import View, open_view
from data_pipeline.mixture import Mixture
from data_pipeline.prepare import RawMembers, write_shards
from data_pipeline.sources import DataSet, Source
from data_pipeline.taken import TakeDowns, write_take_down
from data_pipeline.views import write_keep

ROW = re.compile(r"^(\w+) +([\d,]+) +([\d,]+) +([\d.]+) % +([\d.,]+) +([\d.,]+) steps +([\d,]+)$", re.MULTILINE)


def rows(said: str) -> dict[str, tuple[float, ...]]:
    """name -> samples, used, per cent, samples of a batch, steps of an epoch, left out"""
    return {name: tuple(float(word.replace(",", "")) for word in words) for name, *words in ROW.findall(said)}


@pytest.fixture
def other(tmp_path: Path) -> View:
    samples = [RawMembers(key=f"{n:03d}", members={"png": b"x", "txt": b"x"}) for n in range(130)]
    write_shards(samples, tmp_path / "other", samples_per_shard=13)
    return open_view(tmp_path / "other")


@pytest.mark.parametrize("global_batch", [1, 7, 32, 399, 400])
def test_one_source(shapes_view: View, global_batch: int) -> None:
    data = DataSet.of(shapes_view)
    said = rows(stats.of_run(data, global_batch=global_batch))
    stream = data.stream(seed=3, global_batch=global_batch)
    left = stream.dropped_per_epoch
    assert said == {"data": (400, 400, 100, global_batch, stream.steps_per_epoch, left)}
    assert left == 400 % global_batch
    # As the folder itself says it:
    words = f"{400 // global_batch:,} steps of {global_batch}; {left} samples are left out"
    assert words in stats.text(stats.look(shapes_view.folder), global_batch=global_batch)


def test_what_is_kept_taken_down_and_held_out_is_counted(shapes_view: View, tmp_path: Path) -> None:
    keep = write_keep(shapes_view, np.arange(400) % 3 > 0, reason="r", out=tmp_path / "a.keep")
    down = write_take_down(shapes_view, np.arange(400) < 5, reason="r", out=tmp_path / "a.down")
    source = Source(name="data", view=shapes_view, keeps=(keep,))
    data = DataSet(sources=(source,), take_downs=TakeDowns(lists=(down,)))
    said = stats.of_run(data, global_batch=32, held_out=64)
    assert rows(said) == {"data": (400, 266, 100, 32, (266 - 64) // 32, (266 - 64) % 32)}
    assert "5 samples are taken down" in said
    assert "64 samples are held out" in said
    with pytest.raises(BadSplit):
        stats.of_run(data, global_batch=401)


def test_an_epoch_of_a_source_is_as_long_as_is_said(shapes_view: View, other: View) -> None:
    data = DataSet(sources=(Source(name="a", view=shapes_view, weight=0.7), Source(name="b", view=other, weight=0.3)))
    text = stats.of_run(data, global_batch=16)
    said = rows(text)
    stream = data.stream(seed=1, global_batch=16)
    assert isinstance(stream, Mixture)
    for one in stream.progress(100 * stream.cycle.steps):
        samples, used, share, of_batch, steps, left_out = said[one.name]
        assert (samples, used) == ((400, 400) if one.name == "a" else (130, 130))
        assert share == pytest.approx(100 * one.share)
        assert of_batch == pytest.approx(16 * one.share, abs=0.005)
        assert one.epochs == pytest.approx(100 * stream.cycle.steps / steps, rel=0.01)
        assert left_out == one.left_out
    assert "rounded" not in text
    thirds = DataSet(
        sources=(Source(name="a", view=shapes_view, weight=0.333331), Source(name="b", view=other, weight=0.777777))
    )
    assert "shares are rounded" in stats.of_run(thirds, global_batch=16)


def test_sizes_are_listed(shapes_view: View, tmp_path: Path) -> None:
    buckets = []
    for name, mask, height in (("low", np.arange(400) < 100, 8), ("high", np.arange(400) >= 100, 32)):
        keep = write_keep(shapes_view, mask, reason="r", out=tmp_path / f"{name}.keep")
        buckets.append(Bucket(name=name, height=height, width=16, samples=keep))
    data = DataSet(sources=(Source(name="data", view=shapes_view),), buckets=tuple(buckets))
    said = stats.of_run(data, global_batch=32)
    assert rows(said) == {"data": (400, 400, 100, 32, 3 + 9, 100 % 32 + 300 % 32)}
    assert "100 samples at 8 x 16 (low)" in said
    assert "300 samples at 32 x 16 (high)" in said

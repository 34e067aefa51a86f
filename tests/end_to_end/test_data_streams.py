"""What a run may read besides one folder: pictures of several sizes, mixtures, what is kept and taken down, bare URLs."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import assert_same, configure, live, records, steady

from data_pipeline.manifest import View, open_view
from data_pipeline.prepare import RawMembers, write_shards
from data_pipeline.reader import ShardReader
from data_pipeline.shapes.make import make_shapes
from data_pipeline.taken import write_take_down
from data_pipeline.views import write_keep
from ecdit_train.errors import ConfigError


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> View:
    """96 pictures of 16 pixels in 6 shards."""
    folder = tmp_path_factory.mktemp("shapes")
    make_shapes(folder, count=96, resolution=16, seed=5, samples_per_shard=16)
    return open_view(folder)


@pytest.fixture(scope="module")
def sized(shapes: View) -> tuple[str, ...]:
    """Words for three buckets: 4 x 4, 3 x 5 and 2 x 4 patches of 4 pixels, of which 8 are kept."""
    places = np.arange(96)
    words = []
    for name, mask, height, width in (
        ("square", places < 48, 16, 16),
        ("wide", (places >= 48) & (places < 72), 12, 20),
        ("small", places >= 72, 8, 16),
    ):
        path = shapes.folder / f"{name}.keep"
        write_keep(shapes, mask, reason=name, out=path)
        words.append(f"{name}: {{samples: {path}, height: {height}, width: {width}}}")
    return (f"data.buckets={{{', '.join(words)}}}",)


def test_pictures_of_several_sizes_train_and_resume_bitwise(
    shapes: View, sized: tuple[str, ...], tmp_path: Path
) -> None:
    whole = live(configure(tmp_path / "whole", shapes.folder, *sized))
    assert whole.finished
    config = configure(tmp_path / "parts", shapes.folder, *sized)
    first = live(config, stop_after=5)
    second = live(config)
    assert_same(whole.tensors, second.tensors)
    assert steady(records(tmp_path / "whole")) == steady(records(tmp_path / "parts"))
    trained = {position: batch for life in (first, second) for batch in life.seen for position in batch[0]}
    names = {key for _, keys in trained.values() for key in keys}
    # 12 steps of 8: all three buckets came, each batch is of one.
    of = {key: n for n, key in enumerate(sorted(names_of(shapes)))}
    buckets = [{0 if of[key] < 48 else 1 if of[key] < 72 else 2 for key in keys} for _, keys in trained.values()]
    assert all(len(bucket) == 1 for bucket in buckets)
    assert {next(iter(bucket)) for bucket in buckets} == {0, 1, 2}
    assert names <= of.keys()


def names_of(view: View) -> list[str]:
    reader = ShardReader(view)
    return [reader.read(shard, sample=n).key for shard in range(len(view.shards)) for n in range(view.shards[shard].n)]


@pytest.mark.parametrize(
    ("height", "width", "words", "rule"),
    [
        (16, 18, (), "multiple of"),
        (4, 16, (), "at least the 8 patches"),
        (12, 20, ("diffusion=unmasked", "moe.group_size=32"), "just the 16 patches"),
        (16, 16, ("validation.images=8",), "nothing is held out"),
    ],
)
def test_a_size_that_does_not_fit_is_refused(height: int, width: int, words: tuple[str, ...], rule: str) -> None:
    bucket = f"data.buckets={{a: {{samples: a.keep, height: {height}, width: {width}}}}}"
    with pytest.raises(ConfigError, match=rule):
        configure("run", "shards", bucket, *words)


def test_a_larger_resolution_is_a_stage_from_weights(shapes: View, tmp_path: Path) -> None:
    """256 -> 512 in small: positions have no weights, so a run of twice the side starts from another's."""
    assert live(configure(tmp_path / "small", shapes.folder)).finished
    words = ("data.resolution=32", "moe.group_size=64", f"train.init_from={tmp_path / 'small'}")
    large = live(configure(tmp_path / "large", shapes.folder, *words))
    fresh = live(configure(tmp_path / "fresh", shapes.folder, *words[:2]))
    first, other = (records(tmp_path / name)[0]["train/loss"] for name in ("large", "fresh"))
    assert large.finished
    assert fresh.finished
    assert first < other


def test_a_mixture_with_keeps_and_take_downs_resumes_bitwise(shapes: View, tmp_path: Path) -> None:
    other = tmp_path / "other"
    reader = ShardReader(shapes)
    found = [reader.read(0, sample=n) for n in range(16)]
    members = [{name: bytes(payload) for name, payload in raw.payloads.items()} for raw in found]
    write_shards([RawMembers(key=f"other{n}", members=m) for n, m in enumerate(members)], other, samples_per_shard=8)
    keep, down = tmp_path / "a.keep", tmp_path / "a.down"
    write_keep(shapes, np.arange(96) % 3 > 0, reason="a third less", out=keep)
    write_take_down(shapes, np.arange(96) % 10 == 4, reason="asked for", out=down)
    words = (
        f"data.sources={{a: {{shards: {shapes.folder}, weight: 3, keep: [{keep}]}}, b: {{shards: {other}, weight: 1}}}}",
        f"data.take_down=[{down}]",
    )
    whole = live(configure(tmp_path / "whole", "unused", *words))
    config = configure(tmp_path / "parts", "unused", *words)
    live(config, stop_after=7)
    second = live(config)
    assert_same(whole.tensors, second.tensors)
    keys = list(itertools.chain.from_iterable(keys for _, keys in whole.seen))
    assert len(keys) == 12 * 8
    mine = sorted(names_of(shapes))
    used = {mine.index(key) for key in keys if key in mine}
    assert len(used) <= 64
    assert sum(key.startswith("other") for key in keys) == 12 * 8 / 4
    assert all(n % 3 > 0 and n % 10 != 4 for n in used)


def test_urls_without_an_index_train_and_go_on(shapes: View, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = ",".join(shard.name for shard in shapes.shards)
    urls = f"'pipe:cat {shapes.folder}/{{{names}}}'"
    words = ("data.order=streamed", "data.allow_pipe=true", "data.shuffle=8")
    config = configure(tmp_path / "run", urls, *words)
    first = live(config, stop_after=5)
    assert "at least once" in caplog.text
    assert not first.finished
    second = live(config)
    assert second.finished
    assert [line["step"] for line in records(tmp_path / "run")] == list(range(1, 13))
    with pytest.raises(ConfigError, match=r"data\.allow_pipe=true"):
        configure("run", urls, "data.order=streamed")
    with pytest.raises(ConfigError, match=r"data\.order=streamed"):
        configure("run", "'https://host/{000..005}.tar'")
    with pytest.raises(ConfigError, match=r"needs data\.order=exact"):
        configure("run", urls, *words, "data.keep=[a.keep]")

"""Every batch is of one bucket, every sample of a bucket comes once in an epoch of it, and all is arithmetic."""

from pathlib import Path

import numpy as np
import pytest

from data_pipeline.buckets import Bucket, Buckets
from data_pipeline.errors import BadSplit
from data_pipeline.manifest import View, write_manifest
from data_pipeline.table import Shard
from data_pipeline.taken import write_take_down
from data_pipeline.views import write_keep

SIZES = {"wide": (192, 320), "square": (256, 256), "tall": (320, 192)}


@pytest.fixture
def view(tmp_path: Path) -> View:
    rng = np.random.default_rng(0)
    rows = [
        Shard(name=f"{i}.tar", n=int(rng.integers(0, 80)), bytes=0, sha256=f"{i:064x}", fields=("jpg",)) for i in range(40)
    ]  # fmt: skip
    return write_manifest(tmp_path, shards=rows)


def made(view: View, seed: int, **more: object) -> tuple[Buckets, np.ndarray]:
    """The stream, and the bucket of each sample by its place among the sorted names; -1 for none."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(4, view.num_samples, p=[0.55, 0.15, 0.25, 0.05])
    kind[kind == 3] = -1
    buckets = [
        Bucket(
            name=name,
            height=h,
            width=w,
            samples=write_keep(view, kind == i, reason="", out=view.folder / f"{name}{seed}.keep"),
        )
        for i, (name, (h, w)) in enumerate(sorted(SIZES.items()))
    ]
    return Buckets(view, buckets[::-1], **{"seed": seed, "global_batch": 12, **more}), kind  # type: ignore[arg-type]


def flat(view: View, stream: Buckets, position: np.ndarray, attempt: int = 0) -> np.ndarray:
    located = stream.locate(position, attempt=attempt)
    return np.concatenate([[0], np.cumsum(view.shard_sizes)])[located.shard] + located.sample


@pytest.mark.parametrize("seed", range(6))
def test_each_batch_is_of_one_bucket_and_covers_it(view: View, seed: int) -> None:
    stream, kind = made(view, seed)
    names = sorted(SIZES)
    steps = stream.steps_per_epoch
    seen = flat(view, stream, np.arange(3 * steps * 12)).reshape(-1, 12)
    of = np.array([names.index(stream.of(step).name) for step in range(len(seen))])
    assert (kind[seen] == of[:, None]).all()
    assert [(b.height, b.width) for b in stream.buckets] == [SIZES[name] for name in names]
    total = (kind >= 0).sum()
    assert steps == sum((kind == i).sum() // 12 for i in range(3))
    assert stream.dropped_per_epoch == total - 12 * steps
    for i in range(3):
        whole = (kind == i).sum() // 12
        mine = seen[of == i]
        for epoch in range(3):  # all epochs are whole together: shares are the buckets' own steps
            part = mine[epoch * whole : (epoch + 1) * whole].ravel()
            assert len(part) == whole * 12 == len(set(part))
        counted = np.cumsum(of == i)  # never a batch off its share
        assert (np.abs(counted - np.arange(1, len(of) + 1) * whole / steps) < 1).all()
    again, _ = made(view, seed)
    some = np.array([5, 4 * steps * 12 + 7, 100])
    assert (flat(view, again, some) == [flat(view, stream, some[i : i + 1])[0] for i in range(3)]).all()
    assert (kind[flat(view, stream, np.arange(120), attempt=2)] == kind[seen.ravel()[:120]]).all()
    assert again.identity() == stream.identity()


def test_keeps_and_take_downs_hold_in_buckets(view: View) -> None:
    rng = np.random.default_rng(9)
    mask, gone = rng.random(view.num_samples) < 0.8, rng.random(view.num_samples) < 0.1
    keep = write_keep(view, mask, reason="", out=view.folder / "x.keep")
    down = write_take_down(view, gone, reason="", out=view.folder / "x.down")
    before, kind = made(view, 3, keeps=[keep])
    after, _ = made(view, 3, keeps=[keep], taken=[down])
    position = np.arange(before.steps_per_epoch * 12)
    was, now = flat(view, before, position), flat(view, after, position)
    assert mask[was].all()
    assert ((was != now) == gone[was]).all()
    assert not gone[now].any()
    assert (kind[was] == kind[now]).all()
    assert before.identity() == after.identity() != made(view, 3)[0].identity()


def test_small_and_overlapping_buckets_are_refused(view: View) -> None:
    few, all_ = np.zeros(view.num_samples, bool), np.ones(view.num_samples, bool)
    few[:5] = True
    lists = [
        write_keep(view, mask, reason="", out=view.folder / f"{i}.keep") for i, mask in enumerate((few, all_, ~few))
    ]
    bucket = [Bucket(name=f"b{i}", height=8, width=8, samples=one) for i, one in enumerate(lists)]
    with pytest.raises(BadSplit, match=r"bucket 'b0' has 5 samples: .*another bucket"):
        Buckets(view, [bucket[0], bucket[2]], seed=0, global_batch=12)
    with pytest.raises(BadSplit, match="5 samples are in several"):
        Buckets(view, bucket[:2], seed=0, global_batch=4)

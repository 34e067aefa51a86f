"""Our order as a webdataset stage: the samples of the loader, resumed anywhere, on any number of ranks and workers."""

from __future__ import annotations

import json
import random
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from benchmarks.object_server import ObjectServer
from data_pipeline.errors import BadSplit, BadStage, CorruptShard, StoreTrouble, WrongView
from data_pipeline.exact_source import ExactPipeline, ExactSource
from data_pipeline.loader import StreamingLoader
from data_pipeline.manifest import open_view

BATCH = 16


def keys_of_loader(folder: Path, *, steps: int) -> list[str]:
    loader = StreamingLoader(open_view(folder), global_batch=BATCH, seed=3, resolution=16, threads=0)
    keys = [key for _ in range(steps) for key in next(loader).keys]
    loader.close()
    return keys


def test_yields_what_the_loader_delivers_in_its_order(shapes_folder: Path) -> None:
    source = ExactSource(shapes_folder, global_batch=BATCH, seed=3)
    taken = list(islice(iter(source), 60 * BATCH))  # over two epochs
    assert [sample["__key__"] for sample in taken] == keys_of_loader(shapes_folder, steps=60)
    assert [sample["__position__"] for sample in taken] == list(range(60 * BATCH))
    assert set(taken[0]) == {"__key__", "__url__", "__position__", "png", "txt", "json"}


def test_a_resume_on_any_ranks_loses_and_repeats_nothing(shapes_folder: Path) -> None:
    draw, want = random.Random(7), keys_of_loader(shapes_folder, steps=40)
    for _ in range(12):
        got: dict[int, str] = {}
        state: dict[str, Any] | None = None
        step = 0
        while step < 40:
            world, legs = draw.choice([1, 2, 4, 8]), draw.randint(1, 12)
            for rank in range(world):
                source = ExactSource(shapes_folder, global_batch=BATCH, seed=3, rank=rank, world=world)
                pipeline = ExactPipeline(source, wds.decode("rgb8"), wds.map(lambda s: s), wds.batched(BATCH // world))
                if state is not None:
                    pipeline.load_state_dict(state)
                for batch in islice(iter(pipeline), legs):
                    for position, key in zip(batch["__position__"], batch["__key__"], strict=True):
                        assert position not in got
                        got[position] = key
            state = json.loads(json.dumps(pipeline.state_dict()))
            assert len(json.dumps(state)) < 1024
            step += legs
        assert sorted(got) == list(range(len(got)))
        assert [got[n] for n in range(len(want))] == want


def test_a_stage_that_drops_samples_resumes_exactly(shapes_folder: Path) -> None:
    def run(count: int, state: dict[str, Any] | None = None) -> tuple[list[str], dict[str, Any]]:
        pipeline = ExactPipeline(
            ExactSource(shapes_folder, global_batch=BATCH, seed=3), wds.select(lambda s: b"red" in s["txt"])
        )
        if state is not None:
            pipeline.load_state_dict(state)
        return [sample["__key__"] for sample in islice(iter(pipeline), count)], pipeline.state_dict()

    whole, _ = run(60)
    first, state = run(23)
    assert first + run(37, state)[0] == whole


@pytest.mark.parametrize("workers", [0, 2])
def test_inside_of_torchdatas_loader_with_its_state(shapes_folder: Path, workers: int) -> None:
    def loader() -> StatefulDataLoader:
        return StatefulDataLoader(
            ExactPipeline(ExactSource(shapes_folder, global_batch=BATCH, seed=3), wds.decode("rgb8")),
            batch_size=None, num_workers=workers, multiprocessing_context="spawn" if workers else None,
        )  # fmt: skip

    want = keys_of_loader(shapes_folder, steps=5)
    first = loader()
    stream = iter(first)
    got = [next(stream)["__key__"] for _ in range(33)]
    state = first.state_dict()
    del stream
    second = loader()
    second.load_state_dict(state)
    got += [sample["__key__"] for sample in islice(iter(second), 80 - 33)]
    assert got == want


def test_bad_samples_are_those_of_the_loader(copied_folder: Path) -> None:
    view = open_view(copied_folder)
    start, size = view.load_index(2).span(7)
    with view.tar(2).open("r+b") as file:
        file.seek(start + size // 2)
        file.write(b"\xff" * 8)
    with pytest.raises(CorruptShard):
        list(islice(iter(ExactSource(copied_folder, global_batch=BATCH, seed=3)), 400))
    source = ExactSource(copied_folder, global_batch=BATCH, seed=3, on_bad="substitute")
    got = [sample["__key__"] for sample in islice(iter(source), 400)]
    loader = StreamingLoader(view, global_batch=BATCH, seed=3, resolution=16, on_bad="substitute", max_bad=1)
    assert got == [key for _ in range(25) for key in next(loader).keys]
    loader.close()
    assert len(source.bad) == 1


def test_stages_that_lose_the_place_are_refused(shapes_folder: Path) -> None:
    source = ExactSource(shapes_folder, global_batch=BATCH)
    with pytest.raises(BadStage, match="no shuffle"):
        list(islice(iter(ExactPipeline(source, wds.shuffle(50))), 40))
    with pytest.raises(BadStage, match="__position__"):
        next(iter(ExactPipeline(source, wds.to_tuple("png", "txt"))))


def test_another_stream_is_refused(shapes_folder: Path) -> None:
    state = ExactSource(shapes_folder, global_batch=BATCH, seed=3).state_dict()
    with pytest.raises(WrongView, match="seed: saved 3, here 4"):
        ExactSource(shapes_folder, global_batch=BATCH, seed=4).load_state_dict(state)
    half = state | {"inside": 3}
    with pytest.raises(WrongView, match="a whole one does"):
        ExactSource(shapes_folder, global_batch=BATCH, seed=3, world=2).load_state_dict(half)
    with pytest.raises(BadSplit, match="nearest: 2 or 4"):
        ExactSource(shapes_folder, global_batch=BATCH, world=3)
    assert np.array_equal(
        ExactSource(shapes_folder, global_batch=BATCH).order.locate(np.arange(4)).shard,
        ExactSource(open_view(shapes_folder), global_batch=BATCH).order.locate(np.arange(4)).shard,
    )


def test_iterated_again_what_a_stage_held_back_comes_again(shapes_folder: Path) -> None:
    pipeline = ExactPipeline(ExactSource(shapes_folder, global_batch=BATCH), wds.batched(8))
    first = next(iter(pipeline))["__position__"].tolist()
    second = next(iter(pipeline))["__position__"].tolist()
    assert first + second == list(range(16))


def test_a_source_at_a_url_works_in_spawned_workers_and_is_refused_in_forked_ones(shapes_folder: Path) -> None:
    def keys(how: str) -> list[str]:
        loader = DataLoader(source, batch_size=None, num_workers=2, multiprocessing_context=how, timeout=120)
        return [sample["__key__"] for sample in islice(iter(loader), 2 * BATCH)]

    with ObjectServer(shapes_folder) as server:
        source = ExactSource(server.url, global_batch=BATCH, seed=3)
        assert list(source.view.store.sizes(["manifest.json"]))  # a store that is in use stays in its process
        with pytest.raises(StoreTrouble, match=r"fork of one that has read a store already; start workers by spawn"):
            keys("fork")
        assert keys("spawn") == keys_of_loader(shapes_folder, steps=2)

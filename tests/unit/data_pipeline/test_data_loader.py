"""The stream is exact: any stop, any number of ranks, any number of threads give the same batches."""

import io
import json
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.assemble import Fields, default_fields
from data_pipeline.contract import Batch, Loader
from data_pipeline.decode import decode_image
from data_pipeline.decoders import Picture, PlainDecoder
from data_pipeline.errors import BadArray, BadSplit, UndecodableImage, Where, WrongView
from data_pipeline.loader import StreamingLoader
from data_pipeline.manifest import View
from data_pipeline.prepare import RawMembers, write_shards
from data_pipeline.reader import ShardReader

GLOBAL_BATCH = 32


def loader(view: View, **options: object) -> StreamingLoader:
    settings = {"global_batch": GLOBAL_BATCH, "seed": 3, "resolution": 16, "threads": 2} | options
    return StreamingLoader(view, **settings)  # type: ignore[arg-type]


def signature(batch: Batch) -> list[tuple[int, str, str, bytes]]:
    assert batch.images is not None
    assert batch.captions is not None
    pixels = [image.tobytes() for image in batch.images]
    return list(zip(batch.position.tolist(), batch.keys, batch.captions, pixels, strict=True))


def take(stream: StreamingLoader, steps: int) -> list[list[tuple[int, str, str, bytes]]]:
    return [signature(next(stream)) for _ in range(steps)]


def global_steps(view: View, *, world: int, steps: int, state: dict | None = None, **options: object) -> tuple:
    """Steps of all ranks put together in slot order, and the state after them."""
    streams = [loader(view, rank=rank, world=world, **options) for rank in range(world)]
    for stream in streams:
        if state is not None:
            stream.load_state_dict(json.loads(json.dumps(state)))
    parts = [take(stream, steps) for stream in streams]
    states = [stream.state_dict() for stream in streams]
    assert all(state == states[0] for state in states)
    assert len(json.dumps(states[0])) < 1024
    for stream in streams:
        stream.close()
    return [[sample for part in parts for sample in part[step]] for step in range(steps)], states[0]


def test_batches_hold_what_was_written(shapes_view: View) -> None:
    stream: Loader = loader(shapes_view, world=2, rank=1)
    batch = next(stream)
    assert batch.images is not None
    assert batch.captions is not None
    assert (batch.images.dtype, batch.images.shape) == (np.uint8, (16, 16, 16, 3))
    assert batch.position.dtype == np.int64
    assert batch.position.tolist() == list(range(16, 32))
    assert batch.latents is batch.text is batch.text_mask is None
    reader, image = ShardReader(shapes_view), np.empty((16, 16, 3), np.uint8)
    for slot, key in enumerate(batch.keys):
        raw = reader.read(int(key) // 50, sample=int(key) % 50)
        decode_image(raw.fields["png"], out=image, where=Where("", ""))
        assert raw.key == key
        assert (image == batch.images[slot]).all()
        assert bytes(raw.fields["txt"]).decode() == batch.captions[slot]
    stream.close()


def test_epochs_cover_the_set_and_follow_each_other(shapes_view: View) -> None:
    steps, _ = global_steps(shapes_view, world=1, steps=36)
    assert loader(shapes_view).steps_per_epoch == 12
    keys = [[sample[1] for step in steps[e * 12 : e * 12 + 12] for sample in step] for e in range(3)]
    assert [len(set(epoch)) for epoch in keys] == [384] * 3
    assert keys[0] != keys[1] != keys[2]
    assert [sample[0] for step in steps for sample in step] == list(range(36 * GLOBAL_BATCH))


@pytest.mark.parametrize("stops", [(1, 2, 3), (5, 7, 4), (11, 1, 1), (12, 12, 1), (13, 0, 9)])
def test_resume_is_exact_while_the_world_changes(shapes_view: View, stops: tuple[int, int, int]) -> None:
    """1 -> 2 -> 4 -> 1 ranks, at, before and after the end of an epoch."""
    straight, _ = global_steps(shapes_view, world=1, steps=sum(stops) + 3)
    resumed: list = []
    state = None
    for world, steps in zip((1, 2, 4, 1), (*stops, 3), strict=True):
        part, state = global_steps(shapes_view, world=world, steps=steps, state=state)
        resumed += part
    assert resumed == straight


def test_state_counts_delivered_steps_not_prefetched_ones(shapes_view: View) -> None:
    stream = loader(shapes_view, prefetch=8)
    take(stream, 3)
    state = stream.state_dict()
    assert state["step"] == 3
    after = take(stream, 2)
    stream.load_state_dict(state)  # back, in the same life
    assert take(stream, 2) == after
    stream.close()


def test_threads_and_prefetch_change_nothing(shapes_view: View) -> None:
    wanted, _ = global_steps(shapes_view, world=1, steps=14, threads=0)
    for threads, prefetch in ((1, 0), (2, 1), (7, 5), (64, 2)):
        assert global_steps(shapes_view, world=1, steps=14, threads=threads, prefetch=prefetch)[0] == wanted


def test_a_delivered_batch_is_never_written_again(shapes_view: View) -> None:
    stream = loader(shapes_view)
    first = next(stream)
    before = signature(first)
    take(stream, 6)
    assert signature(first) == before
    stream.close()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seed": 4}, "seed: saved 3, here 4"),
        ({"global_batch": 16}, "global_batch: saved 32, here 16"),
        ({"lanes": 4}, "lanes: saved 8, here 4"),
        ({"window": 1}, "window: saved 2, here 1"),
    ],
)
def test_state_of_another_stream_is_refused(shapes_view: View, change: dict, told: str) -> None:
    state = loader(shapes_view).state_dict()
    with pytest.raises(WrongView, match=told):
        loader(shapes_view, **change).load_state_dict(state)


def test_state_of_another_data_set_and_nonsense_are_refused(shapes_view: View, tmp_path: Path) -> None:
    mine = loader(shapes_view)
    state = mine.state_dict()
    for wrong in ({"view_sha256": "0" * 64}, {"step": -1}, {"step": "3"}, {"v": 0}):
        with pytest.raises(WrongView, match=next(iter(wrong))):
            mine.load_state_dict(state | wrong)
    with pytest.raises(WrongView):
        mine.load_state_dict({})
    assert mine.state_dict() == state


def test_sizes_that_do_not_divide_name_the_nearest(shapes_view: View) -> None:
    with pytest.raises(BadSplit, match="world = 5: must divide global_batch = 32; nearest: 4 or 8"):
        loader(shapes_view, world=5)
    with pytest.raises(BadSplit, match="rank = 2"):
        loader(shapes_view, world=2, rank=2)
    with pytest.raises(
        BadSplit, match=r"fields.images = 'jpg': no shard .* has it; there are \('png', 'json', 'txt'\)"
    ):
        loader(shapes_view, fields=Fields(images=("jpg",)))
    with pytest.raises(BadSplit, match="on_bad"):
        loader(shapes_view, on_bad="ignore")


def test_stats_count(shapes_view: View) -> None:
    stream = loader(shapes_view, world=2)
    take(stream, 3)
    stats = stream.stats()
    assert (stats.steps, stats.samples, stats.read_retries, dict(stats.bad)) == (3, 48, 0, {})
    assert stats.bytes_read > 48 * 1024
    assert stats.stall_seconds > 0
    stream.close()


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


@pytest.fixture
def latent_view(tmp_path: Path) -> View:
    """Latents (2, 4, 4) holding the sample's number, and ragged text of 1 to 6 tokens."""
    samples = [
        RawMembers(
            key=f"{i:04d}",
            members={
                "latent.npy": npy(np.full((2, 4, 4), i, np.float16)),
                "text.npy": npy(np.full((i % 6 + 1, 3), i + 1, np.float32)),
                "json": json.dumps({"caption": f"number {i}"}).encode(),
            },
        )
        for i in range(60)
    ]
    return write_shards(samples, tmp_path / "latents", samples_per_shard=20)


def test_latents_and_ragged_text(latent_view: View) -> None:
    assert default_fields(latent_view) == Fields(latents="latent.npy", captions=("json",))
    fields = default_fields(latent_view, text_len=4)
    stream = StreamingLoader(latent_view, global_batch=12, fields=fields, seed=1)
    batch = next(stream)
    assert batch.images is None
    assert batch.latents is not None
    assert batch.text is not None
    assert batch.text_mask is not None
    assert (batch.latents.shape, batch.latents.dtype) == ((12, 2, 4, 4), np.float16)
    assert (batch.text.shape, batch.text.dtype, batch.text_mask.dtype) == ((12, 4, 3), np.float32, bool)
    number = np.array([int(key) for key in batch.keys])
    assert batch.captions == tuple(f"number {i}" for i in number)
    assert (batch.latents == number[:, None, None, None]).all()
    length = np.minimum(number % 6 + 1, 4)
    assert (batch.text_mask.sum(1) == length).all()
    assert (batch.text == batch.text_mask[:, :, None] * (number + 1)[:, None, None]).all()
    stream.close()


def test_arrays_that_disagree_are_named_whatever_the_threads_do(tmp_path: Path) -> None:
    shapes = [(2, 4, 4)] * 30
    shapes[17] = (2, 5, 4)
    arrays = [npy(np.ones(shape, np.float32)) for shape in shapes]
    samples = [RawMembers(key=f"{i}", members={"latent.npy": array}) for i, array in enumerate(arrays)]
    view = write_shards(samples, tmp_path / "x", samples_per_shard=10)
    for threads in (0, 3):
        stream = StreamingLoader(view, global_batch=30, threads=threads)
        with pytest.raises(BadArray, match=r"key 17, position \d+: array of \(2, 5, 4\)"):
            next(stream)
        stream.close()


def test_how_many_steps_lie_ready_is_counted(shapes_view: View) -> None:
    gate = threading.Event()

    class Slow(PlainDecoder):
        def decode(self, pictures: Sequence[Picture]) -> list[UndecodableImage | None]:
            gate.wait(30)
            return super().decode(pictures)

    loader = StreamingLoader(shapes_view, global_batch=8, resolution=16, threads=2, prefetch=3, decoder=Slow())
    gate.set()
    next(loader)
    assert (loader.stats().steps_ready, loader.stats().steps_ahead) == (0, 3)  # nothing was asked for before
    for step in loader._pending:
        [piece.result() for piece in step.pieces]
    next(loader)
    assert loader.stats().steps_ready == 3
    gate.clear()
    next(loader)  # those that were ready before the gate closed, and none behind them
    next(loader)
    assert loader.stats().steps_ready < 3
    assert loader.stats().epochs == pytest.approx(4 / loader.steps_per_epoch)
    gate.set()
    loader.close()

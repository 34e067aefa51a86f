"""Memory of batches is used again, but never while anybody can see it."""

import gc
import threading

import numpy as np
import pytest
import torch

from data_pipeline.loader import StreamingLoader
from data_pipeline.manifest import View
from data_pipeline.memory import Recycled

SHAPE, DTYPE = (8, 256, 256), np.dtype(np.float16)


def seen_through(array: np.ndarray) -> dict[str, object]:
    """Everything that a consumer may keep instead of the array."""
    tensor = torch.from_numpy(array)
    return {
        "array": array, "row": array[3], "strided": array[::2, 1::3], "bytes": array.view(np.uint8),
        "flat": array.reshape(-1), "turned": array.T, "memoryview": memoryview(array), "slice": memoryview(array)[2:],
        "tensor": tensor, "row of the tensor": tensor[5], "numpy of the tensor": tensor[1].numpy(),
        "asarray": np.asarray(array, copy=False), "buffer": np.frombuffer(array.reshape(-1).data, np.uint8),
        "dlpack": torch.from_dlpack(array), "iterator": iter(array), "view of a view": array[1][2:][::-1],
    }  # fmt: skip


def place(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


@pytest.mark.parametrize("name", list(seen_through(np.empty((8, 4, 4), np.float16))))
def test_nothing_that_is_seen_is_lent_again(name):
    lend = Recycled()
    array = lend(SHAPE, DTYPE)
    first, kept = place(array), seen_through(array)[name]
    del array
    gc.collect()
    others = [lend(SHAPE, DTYPE) for _ in range(6)]
    assert first not in {place(other) for other in others}
    del kept
    gc.collect()
    assert place(lend(SHAPE, DTYPE)) == first


def test_arrays_are_whole_writable_and_of_any_shape():
    lend = Recycled()
    for _ in range(3):
        for shape, dtype in (
            ((64, 70, 80, 3), np.uint8),
            (SHAPE, np.float16),
            ((3,), np.int64),
            ((700, 900), np.float32),
        ):
            array = lend(shape, np.dtype(dtype))
            array[...] = 1
            assert (array.shape, array.dtype) == (shape, dtype)
            assert array.flags.c_contiguous
            assert array.flags.writeable
            assert torch.from_numpy(array).sum() > 0


def test_free_memory_is_bounded_when_sizes_change():
    lend = Recycled()
    for size in (5, 3, 9, 4, 1, 30, 2) * 6:
        lend((1 << 20, size), np.dtype(np.uint8))
        assert len(lend._free) <= 5
    assert lend.made < 12


def test_threads_never_share_an_array():
    lend, wrong = Recycled(), []

    def work(mark: int) -> None:
        for _ in range(300):
            array = lend((1 << 19,), np.dtype(np.uint8))
            array[::4096] = mark
            if (array[::4096] != mark).any():
                wrong.append(mark)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert lend.made <= 4 * 3


def test_a_loader_keeps_what_a_consumer_keeps_and_uses_the_rest_again(shapes_view: View):
    loader = StreamingLoader(shapes_view, global_batch=16, resolution=96, threads=2, seed=3)
    kept = []
    for step in range(60):
        batch = next(loader)
        if step % 7 == 0:
            kept.append((batch.images[step % 16], batch.images[step % 16].copy()))
        if step % 11 == 0:
            kept.append((torch.from_numpy(batch.images)[2:4], batch.images[2:4].copy()))
    for seen, was in kept:
        assert np.array_equal(np.asarray(seen), was)
    assert loader._allocate.made < len(kept) + 8
    loader.close()

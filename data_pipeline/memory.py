"""Memory of batches used again: a new array of some megabytes costs a page fault for each 4 KB before a byte is in it.

An array is lent out and nobody has to give it back. Every array, view, tensor or memoryview made of it keeps its base alive, as
numpy and torch do; only when that is gone, and so nobody can see the memory any more, is it lent again.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

import numpy as np

_LEAST = 256 << 10
"""Bytes from which on memory is lent; the C library keeps smaller pieces by itself."""
_MOST_FREE = 4
"""Pieces kept while nobody has them: a batch has at most three large arrays, and buckets differ in size."""


class _Lent:
    """The base of an array that is out, and of all views of it. Only the last of them to go ends it: arrays are nothing that the
    garbage collector looks into, so no cycle that it takes apart ends it earlier."""

    def __init__(
        self, memory: np.ndarray, *, shape: tuple[int, ...], dtype: np.dtype, back: Callable[[np.ndarray], None]
    ) -> None:
        self._memory, self._back = memory, back
        self.__array_interface__ = {
            "version": 3, "shape": shape, "typestr": dtype.str, "data": (memory.ctypes.data, False),
        }  # fmt: skip

    def __del__(self) -> None:
        self._back(self._memory)


class Recycled:
    """`assemble.Allocate`, thread-safe. Not for page-locked memory: a GPU may still copy out of an array that Python has
    dropped. torch's own allocator waits for that copy and recycles such memory itself."""

    def __init__(self) -> None:
        # Only appends and pops, which are atomic: memory can come back in the middle of anything, in any thread.
        self._free: deque[np.ndarray] = deque()
        self.made = 0
        """Pieces asked of the system."""

    def __call__(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array of any content."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes < _LEAST:
            return np.empty(shape, dtype)
        memory = self._taken(num_bytes)
        return np.asarray(_Lent(memory, shape=shape, dtype=dtype, back=self._free.append))

    def _taken(self, num_bytes: int) -> np.ndarray:
        for _ in range(len(self._free)):
            try:
                memory = self._free.popleft()
            except IndexError:  # another thread was first
                break
            if num_bytes <= memory.nbytes <= 2 * num_bytes:
                return memory
            self._free.append(memory)
        while len(self._free) > _MOST_FREE:
            try:
                self._free.popleft()
            except IndexError:
                break
        self.made += 1
        return np.empty(num_bytes, np.uint8)

"""NVIDIA DALI behind the decoder's slot: it decodes and resizes what we chose and read. The only importer of nvidia.dali.

One bad JPEG ends a DALI pipeline and its object. Whole JPEGs of one or three components go to DALI; all others go to the
reference, which decides what is bad. Should DALI fail all the same, its pipeline is made anew and the reference takes over for
these pictures, counted in `fallbacks`.

One thing DALI lets through: a JPEG whose compressed data are damaged but end well, which libjpeg-turbo warns of and the reference
calls bad. After the index was made its checksum finds such a picture; before, nothing but the reference does.

Pictures that already have their size come out bit for bit as the reference's (both are libjpeg-turbo; tests hold it). Resized ones
differ a little: DALI's antialiased triangular filter, ours is OpenCV's area filter.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from data_pipeline.decode import whole_jpeg
from data_pipeline.decoders import Picture, PlainDecoder
from data_pipeline.errors import DataError, UndecodableImage


class DaliDecoder:
    """Args:
        device: "cpu", or "mixed": nvJPEG on the GPU of this process; its pixels come back to the host, where batches are made.
        at_once: pictures of one call.

    Raises DataError where DALI is not installed.
    """  # fmt: skip

    def __init__(self, *, device: Literal["cpu", "mixed"] = "cpu", device_id: int = 0, at_once: int = 32) -> None:
        try:
            import nvidia.dali  # noqa: F401
        except ImportError as error:
            raise DataError(
                f"data/decoder=dali: nvidia-dali cannot be imported ({error}); install the extra: pip install 'ecdit[dali]'"
            ) from error
        self.at_once = at_once
        self._device, self._device_id = device, None if device == "cpu" else device_id
        self._plain = PlainDecoder()
        self._own = threading.local()
        self._lock = threading.Lock()
        self.fallbacks = 0

    def decode(self, pictures: Sequence[Picture]) -> list[UndecodableImage | None]:
        answers: list[UndecodableImage | None] = [None] * len(pictures)
        left = []
        kinds: dict[tuple[int, int, bool], list[int]] = {}
        for n, picture in enumerate(pictures):
            size = None if isinstance(picture.payload, np.ndarray) else whole_jpeg(picture.payload)
            wanted = picture.out.shape[:2]
            if size is None:
                left.append(n)
            else:
                # An operator that resizes to the same size costs as much as decoding, and blurs.
                kinds.setdefault((*wanted, size == wanted and size[0] == size[1]), []).append(n)
        for kind, numbers in kinds.items():
            if not self._by_dali([pictures[n] for n in numbers], *kind):
                with self._lock:
                    self.fallbacks += 1
                left += numbers
        for n in sorted(left):
            answers[n] = self._plain.decode([pictures[n]])[0]
        return answers

    def close(self) -> None:
        self._own = threading.local()

    def _by_dali(self, pictures: Sequence[Picture], height: int, width: int, fits: bool) -> bool:
        """Whether DALI could. A pipeline belongs to one thread and one kind of call."""
        pipelines: dict[tuple[int, int, bool], Any] = self._own.__dict__.setdefault("pipelines", {})
        kind = height, width, fits
        if kind not in pipelines:
            pipelines[kind] = _pipeline(*kind, at_once=self.at_once, device=self._device, device_id=self._device_id)
        try:
            pipelines[kind].feed_input("files", [np.frombuffer(p.payload, np.uint8) for p in pictures])
            (found,) = pipelines[kind].run()
        except RuntimeError:
            del pipelines[kind]
            return False
        found = found.as_cpu() if self._device == "mixed" else found
        for n, picture in enumerate(pictures):
            picture.out[...] = found.at(n)
        return True


def _pipeline(height: int, width: int, fits: bool, *, at_once: int, device: str, device_id: int | None) -> Any:
    import nvidia.dali as dali

    fn: Any = dali.fn  # its operators and types are made at run time
    types: Any = dali.types

    def decode() -> Any:
        files = fn.external_source(name="files", no_copy=True, dtype=types.UINT8, ndim=1)
        pixels = fn.decoders.image(files, device=device, output_type=types.RGB)  # upright, as EXIF says
        if fits:
            return pixels
        pixels = fn.resize(
            pixels, size=[height, width], mode="not_smaller", interp_type=types.INTERP_TRIANGULAR, antialias=True
        )
        return fn.crop(pixels, crop=(height, width), crop_pos_x=0.5, crop_pos_y=0.5)

    define: Any = dali.pipeline_def
    made = define(decode, batch_size=at_once, num_threads=1, device_id=device_id, prefetch_queue_depth=1)()
    made.build()
    return made

"""From raw samples to the arrays of a batch: which member feeds which field, written in place, slot by slot."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from data_pipeline.captions import CaptionRule
from data_pipeline.catalogue import Shards
from data_pipeline.contract import Batch
from data_pipeline.decode import decode_array
from data_pipeline.decoders import Picture
from data_pipeline.errors import SAMPLE_ERRORS, BadArray, BadSplit, DataError, UndecodableImage, Where
from data_pipeline.reader import RawSample, Value
from data_pipeline.readers import Reader

Allocate = Callable[[tuple[int, ...], np.dtype], np.ndarray]
"""(shape, dtype) -> an array, whatever it holds: each slot is written in full."""

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "npy")


@dataclass(frozen=True, kw_only=True)
class Fields:
    """Names of the tar members that feed a batch; none leaves the field out.

    `images`: of several the first that a sample has. `text_len` is L: shorter text embeddings are padded with zeros (mask
    False), longer ones are cut.
    """

    images: tuple[str, ...] = ()
    latents: str | None = None
    captions: tuple[str, ...] = ()
    """As `captions.CaptionRule` has them: `txt`, `json`, `json:KEY`."""
    text: str | None = None
    text_len: int = 0


def default_fields(view: Shards, *, text_len: int = 0) -> Fields:
    """`usual_fields` of those that a data set has."""
    return usual_fields(view.fields, text_len=text_len)


def usual_fields(have: Collection[str], *, text_len: int = 0) -> Fields:
    """Fields by their usual names: image suffixes, `latent.npy`, `txt` or `json`, `text.npy` (with `text_len`)."""

    def first(*names: str) -> str | None:
        return next((name for name in names if name in have), None)

    return Fields(
        images=tuple(name for name in IMAGE_SUFFIXES if name in have),
        latents=first("latent.npy", "latents.npy"),
        captions=tuple(name for name in ("txt", "json") if name in have),
        text=first("text.npy") if text_len else None,
        text_len=text_len,
    )


@dataclass(frozen=True, kw_only=True)
class ArrayShapes:
    """Shapes and dtypes that every sample of a stream must have; None where the stream has no such field.

    Fixed once for the stream, from the data set's first good sample. Taking them from whichever sample a thread
    decodes first would make *which* of two disagreeing samples is bad a matter of timing.
    """

    latent: tuple[tuple[int, ...], np.dtype] | None = None
    """((C, h, w), dtype)"""
    text: tuple[int, np.dtype] | None = None
    """(Y, dtype)"""


class BatchBuffer:
    """Storage of one batch while threads fill its slots. A new one per step: the consumer may keep what it got. `size`: height
    and width of its pictures."""

    def __init__(
        self, position: np.ndarray, *, fields: Fields, shapes: ArrayShapes, size: tuple[int, int], captions: CaptionRule,
        allocate: Allocate = np.empty,
    ) -> None:  # fmt: skip
        self._fields, self._shapes, self._rule, num = fields, shapes, captions, len(position)
        self.position = position
        self.keys: list[str] = [""] * num
        self._captions: list[str | None] = [None] * num
        self._images = allocate((num, *size, 3), np.dtype(np.uint8)) if fields.images else None
        self.latents = allocate((num, *shapes.latent[0]), shapes.latent[1]) if shapes.latent else None
        self.text = allocate((num, fields.text_len, shapes.text[0]), shapes.text[1]) if shapes.text else None
        self._mask = np.zeros((num, fields.text_len), bool) if shapes.text else None

    def fill(self, slot: int, *, raw: RawSample, where: Where) -> Picture | None:
        """Put one sample into its slot, all but its pixels: those are left to a decoder.

        Raises UndecodableImage (no picture), BadCaption, BadArray or NoCaptionError.
        """
        fields = self._fields
        if fields.captions:  # first: what is skipped need not be decoded
            self._captions[slot] = self._rule.choose(raw.fields, where=where)
        picture = None
        if self._images is not None:
            name = next((name for name in fields.images if name in raw.fields), fields.images[0])
            picture = Picture(_member(raw, name, UndecodableImage, where), self._images[slot], where)
        if fields.latents is not None and self.latents is not None and self._shapes.latent is not None:
            latent = decode_array(_member(raw, fields.latents, BadArray, where), where=where)
            _agree(latent, *self._shapes.latent, where)
            self.latents[slot] = latent
        if fields.text is not None and self.text is not None and self._mask is not None:
            text = decode_array(_member(raw, fields.text, BadArray, where), where=where)
            length = min(len(text), fields.text_len)
            _agree(text, (len(text), self.text.shape[2]), self.text.dtype, where)
            # Both halves are written: an attempt that failed later may have left its own tokens in this slot.
            self.text[slot, :length], self.text[slot, length:] = text[:length], 0
            self._mask[slot] = np.arange(fields.text_len) < length
        self.keys[slot] = raw.key
        return picture

    def filled(self, slot: int, *, key: str, caption: str | None, tokens: int) -> None:
        """A slot whose latent and first `tokens` text embeddings were put there by someone else (`straight`)."""
        self.keys[slot], self._captions[slot] = key, caption
        if self.text is not None and self._mask is not None:
            self.text[slot, tokens:] = 0
            self._mask[slot] = False
            self._mask[slot, :tokens] = True

    def batch(self) -> Batch:
        """The finished batch, once every slot is filled."""
        return Batch(
            position=self.position,
            keys=tuple(self.keys),
            images=self._images,
            latents=self.latents,
            captions=tuple(caption or "" for caption in self._captions) if self._fields.captions else None,
            captioned=np.array([caption is not None for caption in self._captions]) if self._fields.captions else None,
            text=self.text,
            text_mask=self._mask,
        )


def probe_shapes(reader: Reader, *, view: Shards, fields: Fields, limit: int = 16) -> ArrayShapes:
    """Shapes of the first of `limit` samples that can be read. Raises its error when none can."""
    if fields.latents is None and fields.text is None:
        return ArrayShapes()
    shard = int(np.flatnonzero(view.shard_sizes)[0])

    def samples() -> Iterator[tuple[RawSample, Where]]:
        last: DataError | None = None
        for sample in range(min(limit, int(view.shard_sizes[shard]))):
            try:
                raw = reader.read(shard, sample=sample)
            except SAMPLE_ERRORS as error:
                last = error
                continue
            last = None
            yield raw, Where(view.shards[shard].name, raw.key)
        if last is not None:
            raise last

    return shapes_of(samples(), fields=fields)


def shapes_of(samples: Iterable[tuple[RawSample, Where]], *, fields: Fields) -> ArrayShapes:
    """Shapes of the first sample that has what `fields` ask for. Raises the last one's error when none has."""
    if fields.latents is None and fields.text is None:
        return ArrayShapes()
    last: DataError | None = None
    for raw, where in samples:
        try:
            latent = text = None
            if fields.latents is not None:
                array = decode_array(_member(raw, fields.latents, BadArray, where), where=where)
                if array.ndim != 3:
                    raise BadArray(f"{where}: latent of shape {array.shape}; must be (C, h, w)")
                latent = (array.shape, array.dtype)
            if fields.text is not None:
                array = decode_array(_member(raw, fields.text, BadArray, where), where=where)
                if array.ndim != 2:
                    raise BadArray(f"{where}: text embedding of shape {array.shape}; must be (tokens, Y)")
                text = (array.shape[1], array.dtype)
            return ArrayShapes(latent=latent, text=text)
        except SAMPLE_ERRORS as error:
            last = error
    raise last if last is not None else BadSplit("no sample to read the shapes of")


def check_fields(fields: Fields, *, view: Shards) -> None:
    """Refuse fields that no shard has, before the first read. Raises BadSplit naming the ones there are."""
    captions = tuple(source.partition(":")[0] for source in fields.captions)
    asked = (
        ("images", fields.images),
        ("latents", (fields.latents,)),
        ("captions", captions),
        ("text", (fields.text,)),
    )
    for label, names in asked:
        for name in names:
            if name is not None and name not in view.fields:
                raise BadSplit(f"fields.{label} = {name!r}: no shard of {view.folder} has it; there are {view.fields}")
    if fields.text is not None and fields.text_len < 1:
        raise BadSplit("fields.text_len = 0: must be the padded number of text tokens, 1 or more")


def _member(raw: RawSample, name: str, error: type[Exception], where: Where) -> memoryview | np.ndarray:
    value: Value | None = raw.fields.get(name)
    if value is None:
        raise error(f"{where}: the sample has no member {name!r}, only {sorted(raw.fields)}")
    if isinstance(value, str | dict):
        raise error(f"{where}: {name} is {type(value).__name__}; must be a file's bytes or an array")
    return value


def _agree(array: np.ndarray, shape: tuple[int, ...], dtype: np.dtype, where: Where) -> None:
    if array.shape != shape or array.dtype != dtype:
        raise BadArray(f"{where}: array of {array.shape} {array.dtype} in a stream of {shape} {dtype}")

"""What frozen encoders make of pictures and captions, once and for all: `latent.npy` and `text.npy` (real tokens only), float16.

Encoders are a service that somebody else builds (this room has no torch). They see batches of one shape, the last of a
shard filled up with black pictures without words: what is stored of a sample does not depend on how many came with it. Some
batches are with the encoders while the next is decoded, and no more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.assemble import IMAGE_SUFFIXES
from data_pipeline.decode import decode_image
from data_pipeline.errors import BadArray, BadCaption, DataError, UndecodableImage, Where
from data_pipeline.manifest import View
from data_pipeline.parts import Part
from data_pipeline.preparing import drive
from data_pipeline.preparing.drive import Done, Watch
from data_pipeline.preparing.local import Runner
from data_pipeline.preparing.pack import NoCaption, caption_of, samples_of, tasks_of
from data_pipeline.preparing.pixels import npy_bytes
from data_pipeline.preparing.sources import Found, Piece, Source, refuse_inside
from data_pipeline.preparing.tarring import RawMembers, is_short, write_tar
from data_pipeline.preparing.work import Count, Service, Task

IN_FLIGHT = 2
"""Batches with the encoders, of one worker."""
_KEPT = ("txt", "json")
"""Members of the source that the encoded sample has, too."""


@dataclass(frozen=True, kw_only=True)
class ToEncode:
    """`images` uint8 (B, S, S, 3), `captions` B texts; B is always the same."""

    images: np.ndarray
    captions: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """`latents` (B, C, h, w) as the codec gives them, unscaled; `text` (B, L, Y) and `mask` bool (B, L), True at real
    tokens. None where there is no such encoder."""

    latents: np.ndarray | None = None
    text: np.ndarray | None = None
    mask: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class EncodeRule:
    """Args:
        resolution: side of the pictures that the codec sees; shorter side resized, centre cut out, as in training.
        batch: samples that the encoders see at once.
        captions: where they are looked for; the first found is encoded.
        no_caption: of a sample without one; "keep" for latents alone.
        threads: that decode, of one worker. They do not change a byte.

    Raises DataError for values outside their range.
    """

    resolution: int
    batch: int = 32
    captions: tuple[str, ...] = ("txt", "json")
    no_caption: NoCaption = "reject"
    threads: int = 2

    def __post_init__(self) -> None:
        for name in ("resolution", "batch", "threads"):
            if getattr(self, name) < 1:
                raise DataError(f"{name} = {getattr(self, name)}: must be 1 or more")


@dataclass(frozen=True, kw_only=True)
class EncodedSet:
    """What a call has done; `view` is None while other parts are at work."""

    done: Done
    view: View | None


def encode(
    source: Source, folder: Path | str, *, rule: EncodeRule, encoders: Callable[[int], Callable[[ToEncode], Encoded]],
    identity: Mapping[str, Any], name: str = "shard", runner: Runner | None = None, part: Part | None = None,
    watch: Watch | None = None,
) -> EncodedSet:  # fmt: skip
    """Make shards of latents and text embeddings, one of each piece of the source.

    Args:
        encoders: builds them in the process where they run, given its number; can be pickled.
        identity: JSON-able; what names the encoders (sums of their weights). Recorded, and another one is refused.

    Raises:
        WrongView: the folder holds what other encoders made, or of other inputs.
        BadArray: the encoders do not say what they must.
        DataError: not one sample was kept.
    """
    folder = Path(folder)
    refuse_inside(source, folder)
    work = EncodeWork(source=source, rule=rule, folder=folder, name=name, encoders=encoders, identity=identity)
    done = drive.run(work, folder, runner=runner, part=part, watch=watch)
    return EncodedSet(done=done, view=drive.seal(done, folder, meta=work.params))


@dataclass(frozen=True, kw_only=True)
class _Ready:
    """A decoded sample that waits for its batch."""

    found: Found
    members: Mapping[str, bytes]
    caption: str


@dataclass(frozen=True, kw_only=True)
class EncodeWork:
    """`work.Work`."""

    source: Source
    rule: EncodeRule
    folder: Path
    name: str
    encoders: Callable[[int], Callable[[ToEncode], Encoded]]
    identity: Mapping[str, Any]

    @property
    def params(self) -> Mapping[str, Any]:
        rule = {key: value for key, value in asdict(self.rule).items() if key != "threads"}
        return {
            "made_by": "encode",
            "source": dict(self.source.params),
            "name": self.name,
            "encoders": dict(self.identity),
            **rule,
        }

    @property
    def service(self) -> Callable[[int], Callable[[ToEncode], Encoded]]:
        return self.encoders

    def tasks(self) -> list[Task]:
        return tasks_of(self.source, self.folder, name=self.name)

    def make(self, task: Task, *, out: Path, service: Service | None) -> Count:
        assert service is not None
        count = Count()
        with ThreadPoolExecutor(self.rule.threads, thread_name_prefix="decode") as pool:
            write_tar(self._samples(task.piece, count, service=service, pool=pool), out, shard=task.output.name)
        return count

    def _samples(
        self, piece: Piece, count: Count, *, service: Service, pool: ThreadPoolExecutor
    ) -> Iterator[RawMembers]:
        """In the order of the source."""
        flying: deque[tuple[list[_Ready], Any]] = deque()
        for ready, batch in self._batches(piece, count, pool=pool):
            flying.append((ready, service(batch)))
            if len(flying) > IN_FLIGHT:
                yield from self._finish(*flying.popleft(), piece=piece, count=count)
        while flying:
            yield from self._finish(*flying.popleft(), piece=piece, count=count)

    def _batches(
        self, piece: Piece, count: Count, *, pool: ThreadPoolExecutor
    ) -> Iterator[tuple[list[_Ready], ToEncode]]:
        ready: list[_Ready] = []
        images = self._black()
        chunk: list[Found] = []
        found = samples_of(self.source, piece, count)
        while chunk := _own(found, at_most=self.rule.batch):
            for answer in pool.map(lambda one: self._decode(one, piece), chunk):
                if isinstance(answer, _Rejected):
                    count.reject(answer.reason, words=answer.words)
                    continue
                images[len(ready)] = answer[1]
                ready.append(answer[0])
                if len(ready) == self.rule.batch:
                    yield ready, ToEncode(images=images, captions=tuple(one.caption for one in ready))
                    ready, images = [], self._black()
        if ready:
            captions = [one.caption for one in ready] + [""] * (self.rule.batch - len(ready))
            yield ready, ToEncode(images=images, captions=tuple(captions))

    def _black(self) -> np.ndarray:
        return np.zeros((self.rule.batch, self.rule.resolution, self.rule.resolution, 3), np.uint8)

    def _decode(self, found: Found, piece: Piece) -> tuple[_Ready, np.ndarray] | _Rejected:
        where = Where(piece.name, found.file or found.key)
        if not is_short(found.key, suffix="latent.npy"):
            return _Rejected(reason="name too long", words=f"{len(found.key.encode())} bytes")
        try:
            caption = caption_of(found, self.rule.captions, where=where)
            if caption is None and self.rule.no_caption == "reject":
                return _Rejected(reason="no caption", words=str(where))
            name = next((suffix for suffix in IMAGE_SUFFIXES if suffix in found.fields), None)
            if name is None:
                return _Rejected(reason="no picture", words=str(where))
            pixels = np.empty((self.rule.resolution, self.rule.resolution, 3), np.uint8)
            decode_image(found.fields[name], out=pixels, where=where)
        except UndecodableImage as error:
            return _Rejected(reason="undecodable", words=str(error))
        except BadCaption as error:
            return _Rejected(reason="unreadable caption", words=str(error))
        members = {field: bytes(found.fields[field]) for field in _KEPT if field in found.fields}
        if caption is not None:
            members["txt"] = caption.encode()
        return _Ready(found=found, members=members, caption=caption or ""), pixels

    def _finish(self, ready: list[_Ready], promise: Any, *, piece: Piece, count: Count) -> Iterator[RawMembers]:
        encoded: Encoded = promise.result()
        _check(encoded, batch=self.rule.batch)
        for number, one in enumerate(ready):
            arrays = _arrays(encoded, number)
            if not all(np.isfinite(array).all() for array in arrays.values()):
                count.reject("not finite", words=str(Where(piece.name, one.found.key)))
                continue
            count.keep()
            members = {name: npy_bytes(array) for name, array in arrays.items()}
            yield RawMembers(key=one.found.key, members={**one.members, **members})


def _own(found: Iterator[Found], *, at_most: int) -> list[Found]:
    """The next samples with bytes of their own: those of a source are good for one step only."""
    return [
        replace(one, fields={name: bytes(payload) for name, payload in one.fields.items()})
        for one in islice(found, at_most)
    ]


def _arrays(encoded: Encoded, number: int) -> dict[str, np.ndarray]:
    """float16; what does not fit becomes infinity, and is found."""
    arrays = {}
    with np.errstate(over="ignore"):
        if encoded.latents is not None:
            arrays["latent.npy"] = encoded.latents[number].astype(np.float16)
        if encoded.text is not None and encoded.mask is not None:
            arrays["text.npy"] = encoded.text[number][encoded.mask[number]].astype(np.float16)
    return arrays


def _check(encoded: Encoded, *, batch: int) -> None:
    """Raises BadArray where the encoders did not do what they must."""
    for name, array, dims in (("latents", encoded.latents, 4), ("text", encoded.text, 3), ("mask", encoded.mask, 2)):
        if array is not None and (array.ndim != dims or len(array) != batch):
            raise BadArray(f"the encoders gave {name} of shape {array.shape} for a batch of {batch}")
    if encoded.latents is None and encoded.text is None:
        raise BadArray("the encoders gave neither latents nor text")


@dataclass(frozen=True, kw_only=True)
class _Rejected:
    reason: str
    words: str

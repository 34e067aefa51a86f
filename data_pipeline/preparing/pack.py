"""From any source to shards of ours: pictures of one size, their captions, and what was done to them in their json."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data_pipeline.decode import Upright, decode_upright, read_caption, resize_centre
from data_pipeline.errors import BadCaption, DataError, UndecodableImage, Where
from data_pipeline.manifest import View
from data_pipeline.parts import Part
from data_pipeline.preparing import drive
from data_pipeline.preparing.drive import Done, Watch
from data_pipeline.preparing.local import Runner
from data_pipeline.preparing.pixels import encode_image, shorter_side
from data_pipeline.preparing.sources import PICTURES, Damaged, Found, Lost, Piece, Source, Sum, refuse_inside
from data_pipeline.preparing.tarring import RawMembers, is_short, write_tar
from data_pipeline.preparing.work import Count, Service, Task

Crop = Literal["centre", "none"]
NoCaption = Literal["reject", "keep"]


@dataclass(frozen=True, kw_only=True)
class PackRule:
    """Args:
        resolution: pixels of the shorter side; pictures of more are shrunk, those of less are rejected or enlarged (`least`).
        crop: "centre" cuts a square out of the middle, "none" keeps the whole picture.
        least: pixels that the shorter side must have; None is the resolution, so that nothing is enlarged.
        most_aspect: longer side / shorter side; 0 allows any.
        quality: of the JPEG. One that has the size already is copied byte for byte.
        captions: where a caption is looked for; the first found is the sample's txt, all of them stay in its json.
        no_caption: what becomes of a sample without one.

    Raises DataError for values outside their range.
    """

    resolution: int = 256
    crop: Crop = "centre"
    least: int | None = None
    most_aspect: float = 3.0
    quality: int = 95
    captions: tuple[str, ...] = ("txt", "json")
    no_caption: NoCaption = "reject"

    def __post_init__(self) -> None:
        if not 1 <= self.quality <= 100:
            raise DataError(f"quality = {self.quality}: must be 1 to 100")
        if self.resolution < 1:
            raise DataError(f"resolution = {self.resolution}: must be 1 or more")
        if self.most_aspect != 0 and self.most_aspect < 1:
            raise DataError(f"most_aspect = {self.most_aspect}: must be 1 or more, or 0 for any")
        for source in self.captions:
            if source.partition(":")[0] not in ("txt", "json"):
                raise DataError(f"captions = {source!r}: must be txt, json or json:KEY")


@dataclass(frozen=True, kw_only=True)
class Packed:
    """What a call has done."""

    done: Done
    view: View | None
    """None while other parts are at work."""


def pack(
    source: Source, folder: Path | str, *, rule: PackRule | None = None, name: str = "shard",
    runner: Runner | None = None, part: Part | None = None, watch: Watch | None = None,
) -> Packed:  # fmt: skip
    """Make shards `name-000000.tar`, ... of a source, one of each of its pieces.

    Raises:
        WrongView: the folder holds something made by another rule or of other inputs.
        DataError: not one sample was kept.
    """
    refuse_inside(source, Path(folder))
    work = PackWork(source=source, rule=rule or PackRule(), folder=Path(folder), name=name)
    done = drive.run(work, work.folder, runner=runner, part=part, watch=watch)
    return Packed(done=done, view=drive.seal(done, work.folder, meta=work.params))


@dataclass(frozen=True, kw_only=True)
class PackWork:
    """`work.Work`."""

    source: Source
    rule: PackRule
    folder: Path
    name: str
    service: None = None

    @property
    def params(self) -> Mapping[str, Any]:
        return {"made_by": "pack", "source": dict(self.source.params), "name": self.name, **asdict(self.rule)}

    def tasks(self) -> list[Task]:
        return tasks_of(self.source, self.folder, name=self.name)

    def make(self, task: Task, *, out: Path, service: Service | None) -> Count:
        count = Count()
        write_tar(self._samples(task.piece, count), out, shard=task.output.name)
        return count

    def _samples(self, piece: Piece, count: Count) -> Iterator[RawMembers]:
        for found in samples_of(self.source, piece, count):
            where = Where(piece.name, found.file or found.key)
            try:
                sample = self._pack(found, where=where)
            except _RejectedError as error:
                count.reject(error.reason, words=f"{where}{f': {error.words}' if error.words else ''}")
            except UndecodableImage as error:
                count.reject("undecodable", words=str(error))
            except BadCaption as error:
                count.reject("unreadable caption", words=str(error))
            else:
                count.keep()
                yield sample

    def _pack(self, found: Found, *, where: Where) -> RawMembers:
        if not is_short(found.key, suffix="json"):
            raise _RejectedError("name too long", f"{len(found.key.encode())} bytes")
        caption = caption_of(found, self.rule.captions, where=where)
        if caption is None and self.rule.no_caption == "reject":
            raise _RejectedError("no caption", f"has {', '.join(sorted(found.fields))}")
        name = next((suffix for suffix in PICTURES if suffix in found.fields), None)
        if name is None and "npy" in found.fields:
            name = "npy"
        if name is None:
            raise _RejectedError("no picture", f"has {', '.join(sorted(found.fields))}")
        payload = found.fields[name]
        image = decode_upright(payload, least=self.rule.resolution, where=where)
        self._check_size(image)
        jpeg, about = self._picture(payload, image)
        source = {"shard": where.shard, "key": found.key} | ({"file": found.file} if found.file else {})
        meta = {**_json(found, where=where), "pack": {**about, "source": source}}
        members = {"jpg": jpeg, "json": json.dumps(meta, sort_keys=True, ensure_ascii=False).encode("utf-8", "replace")}
        if caption is not None:
            members["txt"] = caption.encode()
        return RawMembers(key=found.key, members=members)

    def _check_size(self, image: Upright) -> None:
        short, long = sorted(image.size)
        least = self.rule.resolution if self.rule.least is None else self.rule.least
        if short < least:
            raise _RejectedError("too small", f"{image.size[0]} x {image.size[1]} pixels (height x width)")
        if self.rule.most_aspect and long > self.rule.most_aspect * short:
            raise _RejectedError("aspect", f"{image.size[0]} x {image.size[1]} pixels (height x width)")

    def _picture(self, payload: bytes | memoryview, image: Upright) -> tuple[bytes, dict[str, Any]]:
        """Its bytes, and what was done to it: sizes are (height, width), the box (top, left, bottom, right)
        of the upright original."""
        side = self.rule.resolution
        if self.rule.crop == "centre":
            pixels = resize_centre(image.pixels, height=side, width=side)
        else:
            pixels = shorter_side(image.pixels, side=side)
        about: dict[str, Any] = {
            "original": list(image.size),
            "box": _box(image.size, square=self.rule.crop == "centre"),
            "size": list(pixels.shape[:2]),
        }
        if image.kind == "jpg" and not image.turned and pixels.shape[:2] == image.size:
            return bytes(payload), {**about, "quality": "as it was"}
        return encode_image(np.ascontiguousarray(pixels), image_format="jpg", quality=self.rule.quality), {
            **about, "quality": self.rule.quality,
        }  # fmt: skip


class _RejectedError(Exception):
    def __init__(self, reason: str, words: str) -> None:
        super().__init__(reason)
        self.reason, self.words = reason, words


def tasks_of(source: Source, folder: Path, *, name: str) -> list[Task]:
    """One output shard for each piece of a source."""
    return [
        Task(number=number, output=folder / f"{name}-{number:06d}.tar", inputs=piece.inputs, piece=piece)
        for number, piece in enumerate(source.pieces())
    ]


def samples_of(source: Source, piece: Piece, count: Count) -> Iterator[Found]:
    """The samples of a piece; all else is counted."""
    for item in source.read(piece):
        if isinstance(item, Found):
            yield item
        elif isinstance(item, Lost):
            count.reject(item.reason, words=item.words, count=item.count)
        elif isinstance(item, Damaged):
            count.damage.append(item.words)
        elif isinstance(item, Sum):
            count.sums[item.name] = item.sha256


def caption_of(found: Found, sources: Sequence[str], *, where: Where) -> str | None:
    """The first caption that a sample has. Raises BadCaption for one that cannot be read."""
    for source in sources:
        payload = found.fields.get(source.partition(":")[0])
        text = None if payload is None else read_caption(payload, source=source, where=where)
        if text is not None:
            return text
    return None


def _json(found: Found, *, where: Where) -> dict[str, Any]:
    """What the sample's json says. Raises BadCaption where it is none."""
    if "json" not in found.fields:
        return {}
    try:
        about = json.loads(str(found.fields["json"], "utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadCaption(f"{where}: unreadable json ({type(error).__name__}: {str(error)[:200]})") from error
    return about if isinstance(about, dict) else {"content": about}


def _box(size: tuple[int, int], *, square: bool) -> list[int]:
    height, width = size
    if not square:
        return [0, 0, height, width]
    side = min(size)
    top, left = (height - side) // 2, (width - side) // 2
    return [top, left, top + side, left + side]

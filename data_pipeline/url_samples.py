"""Samples of one tar at a URL, from its front, by webdataset's readers. Importing this is cheap; reading imports torch."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from data_pipeline.errors import BadMember, CorruptShard, DataError, MissingShard, TruncatedShard
from data_pipeline.reader import RawSample, Value
from data_pipeline.tar import BLOCK, padded, split_name

PROBED = 64
"""Samples that are looked at to learn what a stream holds."""


def samples_of(url: str) -> Iterator[RawSample]:
    """Samples of one tar in its order, of what `tar.split_name` allows.

    `tarfile` takes a damaged header for the end; so the stream is read to its own end, which must be an end-of-archive block and
    zeros right behind the last member. A member whose bytes were changed cannot be told from a good one: nothing has its sum.

    Raises:
        MissingShard: it cannot be opened, or breaks off.
        TruncatedShard, CorruptShard: it ends without an end, or early; the sample before the damage is not given.
    """
    import webdataset as wds

    try:
        with wds.gopen(url) as opened:
            for found in wds.tariterators.group_by_keys(_files(_Watched(_plain(opened)), url=url)):
                fields: dict[str, Value] = {k: memoryview(v) for k, v in found.items() if not k.startswith("__")}
                if fields:
                    size = sum(len(value) for value in found.values() if isinstance(value, bytes))
                    yield RawSample(key=found["__key__"], fields=fields, num_bytes=size)
    except DataError:
        raise
    except Exception as error:
        words = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
        raise MissingShard(f"{url} cannot be read to its end: {words}") from error


class _Watched:
    """A stream that knows how long it is and with how many zeros it ends, so far."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.size = self.zeros = 0

    def read(self, size: int = -1) -> bytes:
        content = self._stream.read(size)
        self.size += len(content)
        rest = content.rstrip(b"\0")
        self.zeros = len(content) - len(rest) + (0 if rest else self.zeros)
        return content


def _plain(stream: Any) -> Any:
    """Unpacked, by what its first bytes say."""
    head = stream.read(6)
    joined = io.BufferedReader(_Joined(head, stream), 1 << 16)
    for magic, opener in ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ\x00", lzma.open)):
        if head.startswith(magic):
            return opener(joined)
    return joined


class _Joined(io.RawIOBase):
    """A stream of which the first bytes have been looked at."""

    def __init__(self, head: bytes, stream: Any) -> None:
        self._head, self._stream = head, stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content, self._head = self._head[: len(buffer)], self._head[len(buffer) :]
        content = content or self._stream.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)


def _files(stream: _Watched, *, url: str) -> Iterator[dict[str, Any]]:
    """As webdataset's `tar_file_iterator`, with a look at the end."""
    end = 0
    with tarfile.open(fileobj=stream, mode="r|") as tar:  # type: ignore[call-overload]
        for info in tar:
            if info.isreg():
                file = tar.extractfile(info)
                assert file is not None
                content = file.read()
                if len(content) != info.size:
                    raise TruncatedShard(f"{url}: ends inside of {info.name!r}")
                if _is_allowed(info.name):
                    yield {"fname": info.name, "data": content, "__url__": url}
            end = info.offset_data + (padded(info.size) if info.isreg() else 0)
            tar.members = []  # type: ignore[attr-defined]  # or it keeps one for each
        while stream.read(1 << 20):
            pass
    if stream.size - stream.zeros > end:
        raise CorruptShard(f"{url}: something that is no tar behind byte {end}, or data behind an end-of-archive block")
    if stream.size < end + BLOCK:
        raise TruncatedShard(f"{url}: ends at byte {stream.size} without an end-of-archive block")


def _is_allowed(name: str) -> bool:
    try:
        split_name(name)
    except BadMember:
        return False
    return True


@dataclass(frozen=True, kw_only=True)
class Probed:
    """What the first samples of some URLs hold."""

    samples: tuple[RawSample, ...]

    @property
    def fields(self) -> frozenset[str]:
        return frozenset(name for raw in self.samples for name in raw.fields)


def probe(urls: Sequence[str], *, patient: bool) -> Probed:
    """The first samples of the first URL that has any; `patient`: one that breaks is passed over. Raises MissingShard."""
    last: DataError | None = None
    for url in urls:
        try:
            if found := list(_first(samples_of(url), PROBED)):
                return Probed(samples=tuple(found))
        except DataError as error:
            last = error
            if not patient:
                raise
    raise MissingShard(f"no sample in any of {len(urls)} URLs; last: {last or 'empty'}")


def _first(samples: Iterable[RawSample], count: int) -> Iterator[RawSample]:
    for number, sample in enumerate(samples, start=1):
        yield sample
        if number == count:
            return

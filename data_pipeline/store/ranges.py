"""One range of one file, by as many requests as it takes: each begins at the byte that is missing."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from data_pipeline.errors import ChangedShard, DataError, StoreTrouble
from data_pipeline.store.patience import Hedging, Patience
from data_pipeline.store.trouble import Passing, lasting, passing

_CHUNK = 256 << 10
"""Bytes that are taken over at once; what a broken connection loses of a range is less than that."""
_VERSIONS = 1 << 14
"""More than the shards that one rank reads from at a time."""


@dataclass(kw_only=True)
class Counts:
    """Of one store, since it was opened. Written by its thread only."""

    requests: int = 0
    bytes: int = 0
    """That have come, those of requests that failed later included."""
    retries: int = 0
    hedged: int = 0
    """Ranges that were asked for a second time because the first answer was slow."""
    hedges_won: int = 0
    trouble: Counter[Passing] = field(default_factory=Counter)
    """Requests that failed in a way that passes, by kind."""
    versions: OrderedDict[str, tuple[int, str | None]] = field(default_factory=OrderedDict)
    """Path -> (bytes, ETag) of the first answer, of the `_VERSIONS` files that were read last."""
    hedging: Hedging | None = None


@dataclass(kw_only=True)
class Range:
    """`length` bytes from `start` on, or the whole file. `size` is what the file must have in all."""

    path: str
    start: int = 0
    length: int | None = None
    size: int | None = None

    @property
    def words(self) -> str:
        """For messages."""
        return "whole" if self.length is None else f"bytes {self.start} to {self.start + self.length}"


@dataclass(kw_only=True)
class _Buffer:
    """What has come of a range, without a gap from its beginning. Two requests may write it: the same bytes."""

    content: bytearray | None = None
    got: int = 0


async def fetch(wanted: Range, *, client: Any, url: str, patience: Patience, counts: Counts) -> bytearray:
    """Raises:
    MissingShard: there is no such file.
    ChangedShard: size or ETag are not those of the first answer.
    StoreTrouble: refused, or no bytes after all retries.
    """
    began = time.monotonic()
    counts.hedging = counts.hedging or Hedging(patience.hedge_after)
    buffer = _Buffer(content=None if wanted.length is None else bytearray(wanted.length))
    asking = _Asking(wanted=wanted, client=client, url=url, patience=patience, counts=counts, buffer=buffer)
    try:
        async with asyncio.timeout(patience.deadline) as limit:
            after = counts.hedging.after() if wanted.length else None
            await (asking.until_it_comes() if after is None else _hedged(asking, after=after))
    except _UsedUpError as error:
        raise StoreTrouble(str(error)) from error.__cause__
    except TimeoutError as error:
        if not limit.expired():
            raise
        counts.trouble["timeout"] += 1
        raise StoreTrouble(
            f"{url}, {wanted.words}: {buffer.got} came in {patience.deadline:g} s (data.read_deadline)"
        ) from error
    counts.hedging.done(time.monotonic() - began)
    assert buffer.content is not None
    return buffer.content


async def _hedged(asking: _Asking, *, after: float) -> None:
    """The first of two that succeeds; the second starts late and asks once. What neither would get ends both."""
    counts = asking.counts
    first, second = asyncio.ensure_future(asking.until_it_comes()), None
    pending: set[asyncio.Future[None]] = {first}
    try:
        late = not (await asyncio.wait(pending, timeout=after))[0]
        if late and asking.buffer.got < (asking.wanted.length or 0):
            counts.hedged += 1
            if counts.hedging is not None:
                counts.hedging.hedged += 1
            second = asyncio.ensure_future(asking.once(asking.buffer.got))
            pending.add(second)
        while pending:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                error = task.exception()
                if error is None:
                    counts.hedges_won += task is second
                    return
                if isinstance(error, DataError) and not isinstance(error, _UsedUpError):
                    raise error
        first.result()  # used up
    finally:
        both = [task for task in (first, second) if task is not None]
        for task in both:
            task.cancel()
        await asyncio.gather(*both, return_exceptions=True)


class _UsedUpError(StoreTrouble):
    """All retries of a range are used up."""


@dataclass(frozen=True, kw_only=True)
class _Asking:
    """Requests for one range."""

    wanted: Range
    client: Any
    url: str
    patience: Patience
    counts: Counts
    buffer: _Buffer

    async def until_it_comes(self) -> None:
        failures = 0
        while True:
            try:
                await self.once(self.buffer.got)
                return
            except DataError:
                raise
            except Exception as error:
                failures += 1
                if failures > self.patience.retries:
                    words = f"{self.url}, {self.wanted.words}: failed {failures} times, last by {passing(error)}"
                    said = str(error).partition("\n")[0]
                    raise _UsedUpError(f"{words}{': ' if said else ''}{said}") from error
                self.counts.retries += 1
            await asyncio.sleep(self.patience.wait(failures))

    async def once(self, got: int) -> None:
        """One request from the `got`-th byte of the range on. Raises DataError for what does not pass, else what obstore raised."""
        wanted, buffer = self.wanted, self.buffer
        self.counts.requests += 1
        try:
            options = {} if wanted.length is None else {"range": (wanted.start + got, wanted.start + wanted.length)}
            async with asyncio.timeout(self.patience.idle):
                answer = await self.client.get_async(wanted.path, options=options)
            self._check_version(answer.meta)
            if buffer.content is None:
                buffer.content, got = bytearray(answer.meta["size"]), 0
            elif wanted.length is None:
                got = 0  # a whole file is asked for again from its beginning
            async for chunk in self._chunks(answer, small=len(buffer.content) - got <= _CHUNK):
                if got + len(chunk) > len(buffer.content):
                    raise StoreTrouble(f"{self.url}: more bytes came than were asked for")
                buffer.content[got : got + len(chunk)] = chunk
                got += len(chunk)
                self.counts.bytes += len(chunk)
                buffer.got = max(buffer.got, got)
            if got < len(buffer.content):
                raise ConnectionError("HTTP error: the answer ended early")
        except DataError:
            raise
        except Exception as error:
            kind = passing(error)
            if kind is None:
                raise lasting(error, url=self.url) from error
            self.counts.trouble[kind] += 1
            raise

    async def _chunks(self, answer: Any, *, small: bool) -> AsyncIterator[Any]:
        """Of one answer, each within the time that it may take; a small one in one piece, which costs half."""
        if small:
            async with asyncio.timeout(self.patience.idle):
                content = await answer.bytes_async()
            yield memoryview(content)
            return
        stream = aiter(answer.stream(min_chunk_size=_CHUNK))
        while True:
            async with asyncio.timeout(self.patience.idle):
                chunk = await anext(stream, None)
            if chunk is None:
                return
            yield chunk

    def _check_version(self, meta: Any) -> None:
        """A file that is replaced between two requests would be a mixture of both."""
        found = (int(meta["size"]), meta.get("e_tag"))
        if self.wanted.size is not None and found[0] != self.wanted.size:
            rule = f"the manifest says {self.wanted.size}"
            raise ChangedShard(f"{self.url} has {found[0]} bytes, {rule}: it was replaced after it was indexed")
        versions = self.counts.versions
        known = versions.setdefault(self.wanted.path, found)
        versions.move_to_end(self.wanted.path)
        if len(versions) > _VERSIONS:
            versions.popitem(last=False)
        if known != found:
            before, now = (f"{size} bytes, ETag {tag}" for size, tag in (known, found))
            raise ChangedShard(f"{self.url} was replaced while it was read: {before}; then {now}")

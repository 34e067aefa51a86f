"""http servers and s3-compatible buckets, by obstore; its own retries are off, since ours go on from the byte that is missing and
are counted. Nothing here may be used after a fork."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

from data_pipeline.errors import DataError, StoreTrouble
from data_pipeline.store.background import Background
from data_pipeline.store.contract import Found
from data_pipeline.store.credentials import s3_settings
from data_pipeline.store.patience import Patience
from data_pipeline.store.ranges import Counts, Range, fetch
from data_pipeline.store.trouble import lasting, passing

T = TypeVar("T")

_PIECE = 16 << 20
_AT_ONCE = 32
_MANY = 64
"""Above so many names a listing is cheaper than asking for each."""


class RemoteStore:
    """See `contract.Store`. `name` is the URL as it was given."""

    def __init__(self, url: str, *, patience: Patience) -> None:
        self.name, self.patience, self.counts = url.rstrip("/"), patience, Counts()
        self.is_s3 = url.startswith("s3:")
        self._client: Any = None
        self._background: Background | None = None
        self._lock = threading.Lock()

    @property
    def background(self) -> Background:
        """Where this store's requests wait; started by the first of them."""
        with self._lock:
            if self._background is None:
                self._background = Background("ecdit-store")
            return self._background

    def url(self, path: str) -> str:
        return f"{self.name}/{path}"

    def sizes(self, paths: Iterable[str] | None = None) -> Iterator[Found]:
        named = None if paths is None else list(paths)
        if not self.is_s3 and named is None:
            rule = "name the files instead, as 'https://host/set/{000..239}.tar'"
            raise StoreTrouble(f"{self.name}: a web server has no list of its files; {rule}")
        if self.is_s3 and (named is None or len(named) > _MANY):
            found = self._wait(self._list())
            return iter(found.values()) if named is None else (found[p] for p in named if p in found)
        return iter(self._wait(self._heads(named or [])))

    def read(self, path: str) -> bytes:
        return bytes(self._wait(self.fetch(Range(path=path))))

    def read_to(self, path: str, target: str) -> None:
        self._wait(self._download(path, target))

    def write(self, path: str, content: bytes) -> None:
        import obstore

        self._wait(self._patiently(path, lambda: obstore.put_async(self.client, path, content)))

    def close(self) -> None:
        """End the thread; a later request starts another."""
        with self._lock:
            background, self._background = self._background, None
        if background is not None:
            background.close()

    async def fetch(self, wanted: Range) -> bytearray:
        """One range. Raises MissingShard, ChangedShard, StoreTrouble."""
        return await fetch(
            wanted, client=self.client, url=self.url(wanted.path), patience=self.patience, counts=self.counts
        )

    @property
    def client(self) -> Any:
        """obstore's. Raises StoreTrouble for a URL or settings that it does not take."""
        if self._client is None:
            self._client = self._connect()
        return self._client

    def _connect(self) -> Any:
        try:
            from obstore.store import HTTPStore, S3Store
        except ImportError as error:
            raise StoreTrouble(f"{self.name}: needs the library obstore (pip install obstore): {error}") from error
        seconds = self.patience.deadline
        options: Any = {
            "allow_http": True, "timeout": timedelta(seconds=seconds),
            "connect_timeout": timedelta(seconds=min(10.0, self.patience.idle)),
        }  # fmt: skip
        once: Any = {"max_retries": 0, "retry_timeout": timedelta(seconds=seconds)}
        try:
            if not self.is_s3:
                return HTTPStore(self.name, client_options=options, retry_config=once)
            bucket, _, prefix = self.name.removeprefix("s3://").partition("/")
            settings: Any = s3_settings()
            return S3Store(bucket, prefix=prefix or None, client_options=options, retry_config=once, **settings)
        except Exception as error:
            raise StoreTrouble(f"{self.name}: {str(error).partition(chr(10))[0]}") from error

    def _wait(self, work: Any) -> Any:
        return self.background.submit(work).result()

    async def _patiently(self, path: str, ask: Callable[[], Awaitable[T]]) -> T:
        """A request that is not a range, again until it succeeds."""
        failures, ends = 0, time.monotonic() + self.patience.deadline
        while True:
            try:
                async with asyncio.timeout(self.patience.idle):
                    return await ask()
            except DataError:
                raise
            except Exception as error:
                kind = passing(error)
                if kind is None:
                    raise lasting(error, url=self.url(path)) from error
                self.counts.trouble[kind] += 1
                failures += 1
                if failures > self.patience.retries or time.monotonic() > ends:
                    raise StoreTrouble(f"{self.url(path)}: failed {failures} times, last by {kind}") from error
                self.counts.retries += 1
                await asyncio.sleep(self.patience.wait(failures))

    async def _list(self) -> dict[str, Found]:
        async def pages() -> list[Any]:
            return [one async for page in self.client.list(chunk_size=1000) for one in page]

        # A listing of a million names takes longer than one request may be silent.
        found = [_found(meta) for meta in await self._patiently("", pages)]
        return {one.path: one for one in sorted(found, key=lambda one: one.path)}

    async def _heads(self, paths: list[str]) -> list[Found]:
        gate = asyncio.Semaphore(_AT_ONCE)

        async def head(path: str) -> Found | None:
            async with gate:
                try:
                    meta = await self._patiently(path, lambda: self.client.head_async(path))
                except DataError as error:
                    if isinstance(error.__cause__, FileNotFoundError):
                        return None
                    raise
            return _found({**meta, "path": path})

        return [found for found in await asyncio.gather(*map(head, paths)) if found is not None]

    async def _download(self, path: str, target: str) -> None:
        found = await self._patiently(path, lambda: self.client.head_async(path))
        size, gate = found["size"], asyncio.Semaphore(4)
        with _descriptor(target) as fd:

            async def piece(start: int) -> None:
                async with gate:
                    wanted = Range(path=path, start=start, length=min(_PIECE, size - start), size=size)
                    os.pwrite(fd, await self.fetch(wanted), start)

            await asyncio.gather(*map(piece, range(0, size, _PIECE)))


@contextmanager
def _descriptor(target: str) -> Iterator[int]:
    fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        yield fd
    finally:
        os.close(fd)


def _found(meta: Any) -> Found:
    return Found(path=str(meta["path"]), size=int(meta["size"]), changed=meta["last_modified"].timestamp())

"""http servers and s3-compatible buckets, by obstore; its own retries are off, since ours go on from the byte that is missing and
are counted. A process that was forked from one that has used a store is refused: the threads of the library stay behind."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
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

_used_by: int | None = None
"""The process in which the threads of obstore run."""
_PIECE = 16 << 20
_AT_ONCE = 32
_LISTED = 50
"""Names of a listing that are waited for together; a page of a store may hold few."""
_HEADS = 1024
_MANY = 64
"""Above so many names a listing is cheaper than asking for each."""


class RemoteStore:
    """See `contract.Store`. `name` is the URL as it was given."""

    def __init__(self, url: str, *, patience: Patience) -> None:
        self.name, self.patience, self.counts = url.rstrip("/"), patience, Counts()
        self.is_s3 = url.startswith("s3:")
        self._client: Any = None
        self._background: Background | None = None
        self._ended = False
        self._lock = threading.Lock()

    def refuse_fork(self) -> None:
        """Raises StoreTrouble where this process is a fork of one that has used a store: requests would wait for ever."""
        global _used_by
        if _used_by is None:
            _used_by = os.getpid()
        if _used_by != os.getpid():
            rule = "start workers by spawn (multiprocessing_context='spawn' of a DataLoader)"
            raise StoreTrouble(f"{self.name}: this process is a fork of one that has read a store already; {rule}")

    @property
    def background(self) -> Background:
        """Where this store's requests wait; started by the first of them. Raises StoreTrouble: closed for good, or after a fork."""
        self.refuse_fork()
        with self._lock:
            if self._ended:
                raise StoreTrouble(f"{self.name}: closed")
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

    def close(self, *, for_good: bool = False) -> None:
        """End the thread; what is under way gets StoreTrouble. A later request starts another thread, or is refused."""
        if _used_by not in (None, os.getpid()):
            return  # the thread, and who may hold the lock, are in another process
        with self._lock:
            self._ended |= for_good
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

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            background = self.background
        except StoreTrouble:
            work.close()
            raise
        try:
            return background.submit(work).result()
        except CancelledError as error:
            raise StoreTrouble(f"{self.name}: closed") from error

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
        """Page by page: a million names take longer than one request may be silent, and each page may fail."""
        found: dict[str, Found] = {}
        stream: Any = None

        async def one_page() -> Sequence[Any]:
            nonlocal stream
            if stream is None:
                stream = aiter(self.client.list(chunk_size=_LISTED, offset=max(found, default=None)))
            try:
                page: Sequence[Any] = await stream.__anext__()
                return page
            except StopAsyncIteration:
                return ()
            except BaseException:
                stream = None  # the next one begins behind what is known
                raise

        while metas := await self._patiently("", one_page):
            found |= {one.path: one for one in map(_found, metas)}
        return dict(sorted(found.items()))

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

        there: list[Found] = []
        for first in range(0, len(paths), _HEADS):  # a task each, so not of a million names at once
            part = await asyncio.gather(*map(head, paths[first : first + _HEADS]))
            there += [found for found in part if found is not None]
        return there

    async def _download(self, path: str, target: str) -> None:
        found = await self._patiently(path, lambda: self.client.head_async(path))
        size, gate = found["size"], asyncio.Semaphore(4)
        with _descriptor(target) as fd:

            async def piece(start: int) -> None:
                async with gate:
                    wanted = Range(path=path, start=start, length=min(_PIECE, size - start), size=size)
                    _write(fd, await self.fetch(wanted), at=start, target=target)

            pieces = [asyncio.ensure_future(piece(start)) for start in range(0, size, _PIECE)]
            try:
                await asyncio.gather(*pieces)
            finally:  # none may write once the file is closed: its number may be another's then
                for one in pieces:
                    one.cancel()
                await asyncio.gather(*pieces, return_exceptions=True)


@contextmanager
def _descriptor(target: str) -> Iterator[int]:
    try:
        fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    except OSError as error:
        raise _no_place(target, error) from error
    try:
        yield fd
    finally:
        os.close(fd)


def _write(fd: int, content: bytearray, *, at: int, target: str) -> None:
    """All of it: a disk that fills up takes a part first."""
    rest = memoryview(content)
    while rest:
        try:
            written = os.pwrite(fd, rest, at)
        except OSError as error:
            raise _no_place(target, error) from error
        rest, at = rest[written:], at + written


def _no_place(target: str, error: OSError) -> StoreTrouble:
    return StoreTrouble(
        f"{target} cannot be written: {error.strerror}; the disk of {os.path.dirname(target)} is this machine's"
    )


def _found(meta: Any) -> Found:
    return Found(path=str(meta["path"]), size=int(meta["size"]), changed=meta["last_modified"].timestamp())

"""A store on this machine for tests and benchmarks: http and the part of s3 that reading uses (path-style GET with ranges, HEAD,
ListObjectsV2 in pages), over the files of a folder. A script says what each request meets: nothing, latency, or one of `FAULTS`.

    python -m benchmarks.object_server FOLDER --latency 0.05

prints its port. `/NAME` and `/anything/NAME` are the same file: what comes first is an s3 bucket.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import formatdate
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

FAULTS = (
    "503", "500", "429", "403", "404", "416", "no_bucket", "reset", "reset_body", "cut_body", "short", "stall", "whole",
    "other_range", "changed", "wrong",
)  # fmt: skip
"""Statuses by number; connection broken before or inside of the body, closed inside of it, an honest 206 of fewer bytes, silence
inside of the body, 200 and the whole file, another range, another ETag, wrong bytes."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One request. `number` counts those for the same bytes, from 0."""

    method: str
    path: str
    start: int | None
    end: int | None
    number: int


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What is to happen. `latency` in seconds before the first byte."""

    fault: str = ""
    latency: float = 0.0
    at: float = 0.5
    """Share of the body that comes before a fault inside of it."""


@dataclass(kw_only=True)
class Rates:
    """A script by shares of requests: seeded, so the counts of two runs agree where their requests do."""

    latency: float = 0.0
    jitter: float = 0.0
    """Seconds more, at most."""
    unavailable: float = 0.0
    resets: float = 0.0
    slow: float = 0.0
    times: float = 100.0
    """How much longer a slow one takes."""
    seed: int = 0
    _random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def __call__(self, asked: Asked) -> Answer:
        draw, latency = self._random.random(), self.latency + self.jitter * self._random.random()
        for share, fault in ((self.unavailable, "503"), (self.resets, "reset_body")):
            if draw < share:
                return Answer(fault=fault, latency=latency)
            draw -= share
        return Answer(latency=latency * (self.times if draw < self.slow else 1.0))


class ObjectServer:
    """Serves in a thread of its own while it is open. `seen` counts what was done: faults by name, `ok`, `list`, `bytes`."""

    def __init__(self, folder: Path, *, script: Callable[[Asked], Answer] | None = None, page: int = 1000) -> None:
        self.folder, self.script, self._page = folder, script or (lambda _: Answer()), page
        self.seen: Counter[str] = Counter()
        self.log: list[Asked] = []
        self._numbers: Counter[tuple[Any, ...]] = Counter()
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="object-server", daemon=True)
        self._thread.start()
        self._ready.wait(10)

    def __enter__(self) -> ObjectServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(5)

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0, backlog=1024)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._request(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.transport.abort()

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, target, _ = lines[0].split()
        headers = {
            name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:] if line)
        }
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        url = urlsplit(target)
        path, query = unquote(url.path).strip("/"), parse_qs(url.query)
        start = end = None
        if headers.get("range", "").startswith("bytes="):
            first, _, last = headers["range"][6:].partition("-")
            start, end = int(first), int(last) + 1 if last else None
        number = self._numbers[method, path, start, end]
        self._numbers[method, path, start, end] += 1
        asked = Asked(method=method, path=path, start=start, end=end, number=number)
        self.log.append(asked)
        answer = self.script(asked)
        if answer.latency:
            await asyncio.sleep(answer.latency)
        self.seen[answer.fault or "ok"] += 1
        if answer.fault == "reset":
            return False
        if answer.fault in ("503", "500", "429", "403", "404", "416"):
            extra = "Retry-After: 1\r\n" if answer.fault in ("429", "503") else ""
            return await _say(writer, int(answer.fault), "<Error><Code>Scripted</Code></Error>", extra=extra)
        if answer.fault == "no_bucket":
            return await _say(writer, 404, "<Error><Code>NoSuchBucket</Code></Error>")
        if "list-type" in query:
            self.seen["list"] += 1
            return await _say(writer, 200, self._listing(query))
        file = next((p for p in (self.folder / path, self.folder / path.partition("/")[2]) if p.is_file()), None)
        if method == "PUT":
            target_file = self.folder / path.partition("/")[2]
            target_file.parent.mkdir(parents=True, exist_ok=True)
            target_file.write_bytes(body)
            return await _say(writer, 200, "", extra='ETag: "put"\r\n')
        if file is None:
            return await _say(writer, 404, "<Error><Code>NoSuchKey</Code></Error>")
        return await self._file(writer, file, asked=asked, answer=answer)

    async def _file(self, writer: asyncio.StreamWriter, file: Path, *, asked: Asked, answer: Answer) -> bool:
        status, fault = file.stat(), answer.fault
        size, start, code = status.st_size, asked.start or 0, 200 if asked.start is None else 206
        end = size if asked.end is None else min(asked.end, size)
        if fault == "whole":
            start, end, code = 0, size, 200
        if start >= size and size:
            return await _say(writer, 416, "")
        if fault == "short":
            end = start + max(1, int((end - start) * answer.at))
        tag = f'"{status.st_mtime_ns:x}-{size:x}{"-changed" if fault == "changed" else ""}"'
        shift = 1 if fault == "other_range" else 0
        head = (
            f"HTTP/1.1 {code} X\r\nContent-Length: {end - start}\r\nETag: {tag}\r\nAccept-Ranges: bytes\r\n"
            f"Last-Modified: {formatdate(status.st_mtime, usegmt=True)}\r\n"
        )
        if code == 206:
            head += f"Content-Range: bytes {start + shift}-{end - 1 + shift}/{size}\r\n"
        writer.write((head + "\r\n").encode())
        if asked.method == "HEAD":
            await writer.drain()
            return True
        with file.open("rb") as content:
            content.seek(start)
            left = end - start
            if fault in ("reset_body", "cut_body", "stall"):
                left = int(left * answer.at)
            while left and (piece := content.read(min(left, 1 << 20))):
                left -= len(piece)
                self.seen["bytes"] += len(piece)
                writer.write(bytes(len(piece)) if fault == "wrong" else piece)
                await writer.drain()
        if fault == "stall":
            await asyncio.sleep(3600)
        if fault == "cut_body":
            writer.close()
            await asyncio.sleep(0.05)
        return fault not in ("reset_body", "cut_body")

    def _listing(self, query: dict[str, list[str]]) -> str:
        prefix, after = query.get("prefix", [""])[0], query.get("continuation-token", query.get("start-after", [""]))[0]
        names = sorted(p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*") if p.is_file())
        names = [name for name in names if name.startswith(prefix) and name > after]
        shown, more = names[: self._page], len(names) > self._page
        rows = []
        for name in shown:
            status = (self.folder / name).stat()
            when = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(status.st_mtime))
            rows.append(
                f"<Contents><Key>{escape(name)}</Key><LastModified>{when}</LastModified><ETag>&quot;x&quot;</ETag>"
                f"<Size>{status.st_size}</Size><StorageClass>STANDARD</StorageClass></Contents>"
            )
        token = f"<NextContinuationToken>{escape(shown[-1])}</NextContinuationToken>" if more else ""
        return (
            '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<IsTruncated>{str(more).lower()}</IsTruncated>{token}{''.join(rows)}</ListBucketResult>"
        )


async def _say(writer: asyncio.StreamWriter, code: int, body: str, *, extra: str = "") -> bool:
    raw = body.encode()
    writer.write(f"HTTP/1.1 {code} X\r\nContent-Length: {len(raw)}\r\n{extra}\r\n".encode() + raw)
    await writer.drain()
    return True


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--latency", type=float, default=0.0)
    parser.add_argument("--jitter", type=float, default=0.0)
    parser.add_argument("--unavailable", type=float, default=0.0)
    parser.add_argument("--resets", type=float, default=0.0)
    parser.add_argument("--slow", type=float, default=0.0)
    args = vars(parser.parse_args(argv))
    server = ObjectServer(args.pop("folder"), script=Rates(**args))
    print(server.port, flush=True)
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        server.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

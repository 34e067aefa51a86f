"""The process that writes a rank's files while training goes on; `background.Saver` starts it.

Jobs and answers are JSON frames on one socket; the bytes lie in memory that both processes map, whose descriptor comes with the
job. It takes part in no exchange between ranks and commits nothing: a temporary folder is all it can fill. It ends with the
socket, so with its trainer, also when that was killed.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import socket
import struct
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what it needs of ecdit is imported in the process, after its signals are set
    from ecdit_train.checkpoint.store import Part

Json = Any
ALIGNMENT = 64
"""Of every chunk in the shared memory: enough for any dtype."""

_LENGTH = struct.Struct("!Q")


def send(channel: socket.socket, message: Json, *, descriptors: tuple[int, ...] = ()) -> None:
    """One frame. Raises OSError when the other side is gone."""
    data = json.dumps(message).encode()
    header = _LENGTH.pack(len(data))
    if descriptors:
        socket.send_fds(channel, [header], list(descriptors))
    else:
        channel.sendall(header)
    channel.sendall(data)


def receive(channel: socket.socket) -> tuple[Json, list[int]]:
    """The next frame and the descriptors that came with it. Raises EOFError when the other side is gone."""
    header, descriptors, _, _ = socket.recv_fds(channel, _LENGTH.size, 4)
    while 0 < len(header) < _LENGTH.size:
        header += _some(channel, _LENGTH.size - len(header))
    if not header:
        raise EOFError
    (left,) = _LENGTH.unpack(header)
    data = bytearray()
    while left > len(data):
        data += _some(channel, min(left - len(data), 1 << 20))
    return json.loads(data), descriptors


def _some(channel: socket.socket, count: int) -> bytes:
    if not (data := channel.recv(count)):
        raise EOFError
    return data


def offsets(part: Part) -> list[int]:
    """Where each chunk of a part begins in the shared memory."""
    found, cursor = [], 0
    for chunk in part.chunks:
        found.append(cursor)
        cursor += -(-chunk.nbytes // ALIGNMENT) * ALIGNMENT
    return found


def room(part: Part) -> int:
    """Bytes of shared memory that a part needs; never 0, which cannot be mapped."""
    return sum(-(-chunk.nbytes // ALIGNMENT) * ALIGNMENT for chunk in part.chunks) or ALIGNMENT


def to_json(part: Part) -> Json:
    chunks = [[c.name, list(c.box.offset), list(c.box.size), c.offset, c.nbytes, c.group, c.place] for c in part.chunks]
    return {
        "folder": part.folder,
        "id": part.id,
        "rank": part.rank,
        "header": part.header.hex(),
        "num_written": part.num_written,
        "chunks": chunks,
    }


def encoded(part: Part) -> bytes:
    return json.dumps(to_json(part)).encode()


def from_json(job: Json) -> Part:
    from ecdit_train.checkpoint.plan import PlannedChunk
    from ecdit_train.checkpoint.store import Part
    from ecdit_train.parallel.placement import Box

    chunks = (
        PlannedChunk(
            name=name, box=Box(tuple(offset), tuple(size)), offset=start, nbytes=nbytes, group=group, place=place
        )
        for name, offset, size, start, nbytes, group, place in job["chunks"]
    )
    return Part(**job | {"header": bytes.fromhex(job["header"]), "chunks": tuple(chunks)})


def main(descriptor: int) -> None:
    # Stop signals of a job reach every process of a step; what is being written is asked for by the trainer's last save.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    os.nice(10)  # the loader's threads and the training come first
    channel = socket.socket(fileno=descriptor)
    while True:
        try:
            job, descriptors = receive(channel)
        except (EOFError, ConnectionError):
            return
        answer = _write(job[0], job[1], memory=descriptors[0])
        try:
            send(channel, answer)
        except OSError:  # the trainer is gone
            return


def _write(start: int, length: int, *, memory: int) -> Json:
    """The job is `length` bytes of JSON at `start` of the memory, behind the bytes that it is about."""
    from ecdit_train.checkpoint.store import write

    with mmap.mmap(memory, start + length, prot=mmap.PROT_READ) as mapped, memoryview(mapped) as view:
        os.close(memory)
        part = from_json(json.loads(bytes(view[start : start + length])))
        starts = offsets(part)
        try:
            report = write(part, read=lambda n: view[starts[n] : starts[n] + part.chunks[n].nbytes])
        except Exception as error:
            return {"id": part.id, "failed": [type(error).__name__, getattr(error, "errno", None), str(error)]}
        return {"id": part.id, "report": report}

"""The records of a `.wandb` file, as bytes: LevelDB's log format with W&B's head. Standard library only.

Blocks of 32 KiB hold chunks: CRC-32 of kind and data, length, kind (1 whole, 2 first, 3 middle, 4 last), data. W&B's service writes
them; one that was killed leaves a cut end, which is no record.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

BLOCK = 32768
HEAD = 7
WHOLE, FIRST, LAST = 1, 2, 4


def records(path: Path) -> Iterator[bytes]:
    """Serialized `wandb_internal.Record` messages in order, up to the first damage. Raises OSError, and ValueError for
    another kind of file."""
    data = path.read_bytes()
    if data[:4] != b":W&B":
        raise ValueError(f"{path} is not a .wandb file")
    at, record = HEAD, b""
    while at + HEAD <= len(data):
        if (left := BLOCK - at % BLOCK) < HEAD:
            at += left
            continue
        crc, length, kind = struct.unpack("<IHB", data[at : at + HEAD])
        chunk = data[at + HEAD : at + HEAD + length]
        if len(chunk) < length or zlib.crc32(chunk, zlib.crc32(bytes([kind]))) != crc:
            return
        at += HEAD + length
        record = chunk if kind in (WHOLE, FIRST) else record + chunk
        if kind in (WHOLE, LAST):
            yield record

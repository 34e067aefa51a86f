"""Reads an offline `.wandb` file without wandb's private classes."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2


def records(path: Path) -> Iterator[Any]:
    b, o, buf = path.read_bytes(), 7, b""
    if b[:4] != b":W&B" or struct.unpack("<H", b[4:6])[0] != 0xBEE1:
        raise ValueError(f"{path} is not a .wandb file")
    while o + 7 <= len(b):
        left = 32768 - o % 32768
        if left < 7:  # block trailer
            o += left
            continue
        crc, n, kind = struct.unpack("<IHB", b[o : o + 7])
        data = b[o + 7 : o + 7 + n]
        if zlib.crc32(data, zlib.crc32(bytes([kind]))) != crc:
            raise ValueError(f"bad checksum at byte {o} of {path}")
        o, buf = o + 7 + n, buf + data
        if kind in (1, 4):  # FULL or LAST
            record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            record.ParseFromString(buf)
            buf = b""
            yield record


def history(path: Path) -> list[dict[str, Any]]:
    """What `run.log` was given, in order."""
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records(path)
        if record.WhichOneof("record_type") == "history"
    ]


def run_files(run_folder: Path) -> list[Path]:
    return sorted(run_folder.glob("wandb/offline-run-*/*.wandb"))

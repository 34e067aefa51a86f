"""One safetensors file, written front to back in the memory of one box.

The format is safetensors' own: eight bytes with the header's length, a JSON header, then the bytes of the tensors. The
library's writer wants every tensor of a file in memory at once, which for stacked experts is tens of gigabytes; its
readers read this file (`tests/unit/export`).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from ecdit_train.checkpoint.rank_file import SAFETENSORS_NAME, TensorInfo
from ecdit_train.checkpoint.store import as_bytes

_ALIGNMENT = 8


def write(
    path: Path, *, tensors: Mapping[str, TensorInfo], boxes: Mapping[str, Iterator[Tensor]], metadata: Mapping[str, str]
) -> None:
    """Write a file that does not exist yet, and fsync it.

    Args:
        path: of the file.
        tensors: name -> shape and type.
        boxes: name -> the tensor's values, in row-major order, cut as one likes.
        metadata: text that readers may show.

    Raises:
        OSError: the disk is full, the file exists ...
    """
    # Wide types first, so that every tensor is aligned to its element.
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    cursor = 0
    for name in order:
        info = tensors[name]
        end = cursor + math.prod(info.shape) * info.itemsize
        header[name] = {"dtype": SAFETENSORS_NAME[info.dtype], "shape": list(info.shape), "data_offsets": [cursor, end]}
        cursor = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            start = file.tell()
            for part in boxes[name]:
                file.write(as_bytes(part))
            wrote, info = file.tell() - start, tensors[name]
            assert wrote == math.prod(info.shape) * info.itemsize, f"{name}: {wrote} bytes for {info}"
        file.flush()
        os.fsync(file.fileno())

"""`manifest.json`: what a checkpoint holds, where every chunk lies, and what its bytes must sum to.

The file is `{"sha256":"<64 hex>","body":<canonical JSON>}` and a newline; the hash is over the body's exact bytes, so
no bit of the file can change unseen. A hash is not a signature: everything read is still checked against caps and
bounds before it is used, because a folder may come from a stranger.

    body = {format, format_version, step, id, world, torch, files: [[name, nbytes]],
            tensors: {name: {shape, dtype, chunks: [[file index, offset, nbytes, crc32, box offset, box size]]}},
            objects: {name: JSON}}
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ecdit_train.checkpoint import files
from ecdit_train.checkpoint.failures import CheckpointDamagedError, CheckpointMismatchError
from ecdit_train.checkpoint.layout import DTYPES
from ecdit_train.checkpoint.plan import TensorInfo, cover_problem
from ecdit_train.errors import CheckpointError
from ecdit_train.parallel.placement import Box
from ecdit_train.parallel.runtime import Json, encode_json

T = TypeVar("T")

FORMAT = "ecdit-checkpoint"
FORMAT_VERSION = 1
NAME = "manifest.json"
MAX_MANIFEST_BYTES = 512 * 2**20
"""A 97B model with optimizer state on 512 ranks needs about a tenth of this."""

MAX_COUNT = 2**62
"""Bound on every number in a manifest: sums of two stay below 2**63."""

_HEAD, _MIDDLE, _TAIL = b'{"sha256":"', b'","body":', b"}\n"
_DATA_FILE = re.compile(r"rank_[0-9]{5,9}\.bin")


@dataclass(frozen=True, slots=True)
class Chunk:
    """`box` of a tensor, row-major little-endian, at `offset` of `file`; `crc32` is zlib's, of the `nbytes`."""

    file: str
    offset: int
    nbytes: int
    crc32: int
    box: Box


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor: what it is globally and the chunks that cover it exactly once."""

    info: TensorInfo
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything but the bytes. `world` and `torch_version` are of the writer, for people; a reader needs neither."""

    step: int
    id: str
    world: int
    torch_version: str
    files: Mapping[str, int]
    tensors: Mapping[str, Entry]
    objects: Mapping[str, Json]
    sha256: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of all data files."""
        return sum(self.files.values())


def to_bytes(manifest: Manifest) -> bytes:
    """The file's content. Raises CheckpointError if it would be larger than a reader accepts."""
    index = {name: i for i, name in enumerate(sorted(manifest.files))}
    body = encode_json(
        {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "step": manifest.step,
            "id": manifest.id,
            "world": manifest.world,
            "torch": manifest.torch_version,
            "files": [[name, manifest.files[name]] for name in index],
            "tensors": {
                name: {
                    "shape": list(entry.info.shape),
                    "dtype": entry.info.dtype,
                    "chunks": [
                        [index[c.file], c.offset, c.nbytes, c.crc32, list(c.box.offset), list(c.box.size)]
                        for c in entry.chunks
                    ],
                }
                for name, entry in manifest.tensors.items()
            },
            "objects": dict(manifest.objects),
        }
    )
    data = _HEAD + hashlib.sha256(body).hexdigest().encode() + _MIDDLE + body + _TAIL
    if len(data) > MAX_MANIFEST_BYTES:
        raise CheckpointError(f"the manifest would have {len(data)} bytes; readers accept {MAX_MANIFEST_BYTES}")
    return data


def read(path: Path) -> Manifest:
    """The manifest of a committed folder, fully checked except for the bytes of the data files.

    Raises CheckpointDamagedError (missing, cut, flipped, inconsistent) or
    CheckpointMismatchError (another format version).
    """
    described = parse(_load(path), where=f"{path.name}/{NAME}")
    stem = path.name.partition(".")[0]  # a copy may have any name, but not that of another step
    if stem.startswith("step_") and stem != f"step_{described.step:08d}":
        raise CheckpointDamagedError(f"{path.name} holds step {described.step}: the folder was renamed")
    return described


def _load(path: Path) -> bytes:
    where = f"{path.name}/{NAME}"
    try:
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            raise CheckpointDamagedError(f"{path} is not a folder (symbolic links are not followed)")
        size = os.lstat(path / NAME).st_size
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointDamagedError(f"{where} is missing") from error
    if size > MAX_MANIFEST_BYTES:
        raise CheckpointDamagedError(f"{where} has {size} bytes; at most {MAX_MANIFEST_BYTES} are accepted")
    with files.sound_file(path / NAME, nbytes=size, holds="the manifest") as descriptor:
        return bytes(files.read_at(descriptor, offset=0, nbytes=size))


def read_sizes(path: Path) -> dict[str, int]:
    """{data file: bytes} without checking the tensors: retention asks this of every step after every save."""
    return _checked(_load(path), where=f"{path.name}/{NAME}", build=lambda tree, _: _files(tree))


def parse(data: bytes, *, where: str = NAME) -> Manifest:
    """Check the hash, then every field. Raises CheckpointDamagedError or CheckpointMismatchError."""
    return _checked(data, where=where, build=lambda tree, digest: _from_tree(tree, digest=digest))


def _checked(data: bytes, *, where: str, build: Callable[[dict[str, Any], str], T]) -> T:
    start = len(_HEAD) + 64 + len(_MIDDLE)
    body = data[start : -len(_TAIL)]
    digest = hashlib.sha256(body).hexdigest()
    if data != _HEAD + digest.encode() + _MIDDLE + body + _TAIL:
        raise CheckpointDamagedError(f"{where} is damaged: its content does not match its own SHA-256")
    try:
        tree = json.loads(body, parse_constant=_refuse_constant)
        _need(type(tree) is dict and tree.get("format") == FORMAT, "not an ecdit checkpoint")
        version = _count(tree.get("format_version"), "format_version")
        if version != FORMAT_VERSION:
            raise CheckpointMismatchError(
                f"{where}: format version {version}; this ecdit reads version {FORMAT_VERSION} (use a matching release)"
            )
        return build(tree, digest)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointDamagedError(f"{where} is not a valid manifest: {type(error).__name__}: {error}") from error
    except CheckpointDamagedError as error:
        raise CheckpointDamagedError(f"{where} is not a valid manifest: {error}") from None


def _files(tree: dict[str, Any]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for name, nbytes in tree["files"]:
        # The name pattern is the path check: no separator, no dot-dot, no absolute path can match it.
        _need(type(name) is str and _DATA_FILE.fullmatch(name) is not None, f"file name {name!r}")
        _need(name not in sizes, f"file {name} listed twice")
        sizes[name] = _count(nbytes, f"size of {name}")
    return sizes


def _from_tree(tree: dict[str, Any], *, digest: str) -> Manifest:
    sizes = _files(tree)
    names = list(sizes)
    _need(type(tree["objects"]) is dict and type(tree["tensors"]) is dict, "tensors and objects must be tables")
    _need(type(tree["id"]) is str and type(tree["torch"]) is str, "id and torch must be strings")
    tensors = {name: _entry(name, raw=raw, names=names, sizes=sizes) for name, raw in tree["tensors"].items()}
    _check_disjoint(tensors)
    return Manifest(
        step=_count(tree["step"], "step"),
        id=tree["id"],
        world=_count(tree["world"], "world"),
        torch_version=tree["torch"],
        files=sizes,
        tensors=tensors,
        objects=tree["objects"],
        sha256=digest,
    )


def _entry(name: str, *, raw: Any, names: list[str], sizes: dict[str, int]) -> Entry:
    shape = tuple(_count(n, f"shape of {name}") for n in raw["shape"])
    _need(raw["dtype"] in DTYPES, f"dtype {raw['dtype']!r} of {name}")
    info = TensorInfo(shape=shape, dtype=raw["dtype"])
    itemsize = info.itemsize
    chunks = []
    for listed in raw["chunks"]:  # a large run has a million of these: one test each, words only when it fails
        file, offset, nbytes, crc, start, size = listed
        box = Box(tuple(start), tuple(size))
        if not (
            all(type(n) is int and 0 <= n < MAX_COUNT for n in (file, offset, nbytes, crc, *start, *size))
            and len(start) == len(size) == len(shape)
            and file < len(names)
            and nbytes == box.volume * itemsize
            and offset + nbytes <= sizes[names[file]]
        ):
            raise CheckpointDamagedError(f"chunk {str(listed)[:200]} of {name}")
        chunks.append(Chunk(names[file], offset, nbytes, crc, box))
    problem = cover_problem(shape, boxes=sorted(chunk.box for chunk in chunks))
    _need(problem is None, f"{name}: {problem}")
    return Entry(info=info, chunks=tuple(chunks))


def _check_disjoint(tensors: Mapping[str, Entry]) -> None:
    """Chunks may not share bytes: with exact cover this bounds the tensors' size by the size of the files."""
    spans = sorted((c.file, c.offset, c.nbytes, name) for name, entry in tensors.items() for c in entry.chunks)
    for (file, offset, nbytes, name), (next_file, next_offset, _, next_name) in itertools.pairwise(spans):
        if file == next_file and offset + nbytes > next_offset:
            raise CheckpointDamagedError(f"chunks of {name} and {next_name} share bytes")


def gaps(manifest: Manifest) -> dict[str, list[tuple[int, int]]]:
    """[start, stop) of the bytes in each file that belong to no chunk (alignment; they must be zero)."""
    spans: dict[str, list[tuple[int, int]]] = {name: [] for name in manifest.files}
    for entry in manifest.tensors.values():
        for chunk in entry.chunks:
            spans[chunk.file].append((chunk.offset, chunk.offset + chunk.nbytes))
    holes: dict[str, list[tuple[int, int]]] = {}
    for name, parts in spans.items():
        cursor, holes[name] = 0, []
        for start, stop in [*sorted(parts), (manifest.files[name], manifest.files[name])]:
            if start > cursor:
                holes[name].append((cursor, start))
            cursor = stop
    return holes


def _need(condition: bool, what: str) -> None:
    if not condition:
        raise CheckpointDamagedError(what)


def _count(value: Any, what: str) -> int:
    """A non-negative integer below MAX_COUNT (and not a bool), or CheckpointDamagedError."""
    if type(value) is not int or not 0 <= value < MAX_COUNT:
        raise CheckpointDamagedError(f"{what}: {str(value)[:40]!r} is not a count")
    return value


def data_file(rank: int) -> str:
    """Name of the file that `rank` writes."""
    return f"rank_{rank:05d}.bin"


def tensor_bytes(manifest: Manifest) -> int:
    """Bytes of all tensors, each counted once."""
    return sum(math.prod(e.info.shape) * e.info.itemsize for e in manifest.tensors.values())


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")

"""A tar of samples by webdataset's own writer, with bytes that depend on the samples alone: no times, no owners.

The writer sorts the members of what it is given by suffix, which would put json before png and webp. So it is given one
member at a time: the payload comes first, and a reader that wants pixels only can stop early.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import BadMember
from data_pipeline.tar import split_name

_TEXT_SUFFIXES = ("txt", "json")
MAX_NAME = 255
"""Bytes of a member's name, as in plain ustar."""


def is_short(key: str, *, suffix: str) -> bool:
    """Whether a member may have this name."""
    return len(f"{key}.{suffix}".encode()) <= MAX_NAME


@dataclass(frozen=True, kw_only=True)
class RawMembers:
    """One sample to write: a key and the bytes of its members by suffix ("png", "txt", "latent.npy")."""

    key: str
    members: Mapping[str, bytes]


def write_tar(samples: Iterable[RawMembers], out: Path, *, shard: str) -> None:
    """Raises BadMember for a key or a suffix that no reader would take; `shard` is its name in messages."""
    from webdataset import TarWriter  # here: it imports torch

    with (
        out.open("wb") as file,
        TarWriter(file, user="", group="", mode=0o444, mtime=0, encoder=False) as writer,
    ):
        for sample in samples:
            for suffix in sorted(sample.members, key=lambda s: (s in _TEXT_SUFFIXES, s)):
                _check_name(sample.key, suffix, shard=shard)
                writer.write({"__key__": sample.key, suffix: sample.members[suffix]})


def _check_name(key: str, suffix: str, *, shard: str) -> None:
    name = f"{key}.{suffix}"
    try:
        if split_name(name) != (key, suffix):
            raise BadMember("the key may not contain a dot")
        if not is_short(key, suffix=suffix):
            raise BadMember(f"a member's name may have {MAX_NAME} bytes")
    except BadMember as error:
        raise BadMember(f"shard {shard}: key {key!r}, suffix {suffix!r}: {error}") from None

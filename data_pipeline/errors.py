"""What can be wrong with data, one class and one exit code each.

=================  ====  ==========================================================================
class              code  meaning
=================  ====  ==========================================================================
DataError            74  base; a data problem without a class of its own
MissingShard         60  a tar, an index or a manifest is not there or cannot be opened
TruncatedShard       61  a tar ends before its content does
CorruptShard         62  bytes differ from what the index or the manifest promised
UndecodableImage     63  an image that is damaged, of an unknown kind, or too large to be honest
BadCaption           64  a caption that is missing, empty or not UTF-8
WrongView            65  loader state or a folder belongs to another data set, seed or global batch
BadMember            66  a tar member with a refused suffix, a refused name, or out of order
BadSplit             67  sizes that do not divide: world, global batch, lanes, too few samples
TooManyBad           68  more substituted samples than `max_bad` allows
BadArray             69  latents or text embeddings that are not a plain finite array of the right shape
=================  ====  ==========================================================================
"""

# ruff: noqa: N818 - the names say what is wrong; "Error" at the end of each would add nothing
from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Where:
    """The place of one sample, for messages: shard file, key, global sample position (-1: not in a stream)."""

    shard: str
    key: str
    position: int = -1

    def __str__(self) -> str:
        place = f"shard {self.shard}, key {self.key}"
        return place if self.position < 0 else f"{place}, position {self.position}"


class DataError(Exception):
    """Base of every data problem; `exit_code` is what the process returns."""

    exit_code = 74


class MissingShard(DataError):
    exit_code = 60


class TruncatedShard(DataError):
    """`num_whole` counts the samples that are complete before the cut."""

    exit_code = 61

    def __init__(self, message: str, *, num_whole: int = 0) -> None:
        super().__init__(message)
        self.num_whole = num_whole


class CorruptShard(DataError):
    exit_code = 62


class UndecodableImage(DataError):
    exit_code = 63


class BadCaption(DataError):
    exit_code = 64


class WrongView(DataError):
    exit_code = 65


class BadMember(DataError):
    exit_code = 66


class BadSplit(DataError):
    exit_code = 67


class TooManyBad(DataError):
    exit_code = 68


class BadArray(DataError):
    exit_code = 69


SAMPLE_ERRORS = (TruncatedShard, CorruptShard, UndecodableImage, BadCaption, BadArray)
"""Faults of one sample, which `on_bad="substitute"` may replace. The others concern a shard or the whole view."""

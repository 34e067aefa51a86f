"""What can be wrong with data: one class and one exit code each; the first line of a class says what it means."""

# ruff: noqa: N818 - the names say what is wrong; "Error" at the end of each would add nothing
from __future__ import annotations

import errno
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
    """A data problem without a class of its own; base of the others."""

    exit_code = 74


class MissingShard(DataError):
    """A tar, an index or a manifest is not there or cannot be opened."""

    exit_code = 60


class TruncatedShard(DataError):
    """A tar ends before its content does.

    `num_whole` counts the samples that are complete before the cut.
    """

    exit_code = 61

    def __init__(self, message: str, *, num_whole: int = 0) -> None:
        super().__init__(message)
        self.num_whole = num_whole


class CorruptShard(DataError):
    """Bytes differ from what the index or the manifest promised."""

    exit_code = 62


class UndecodableImage(DataError):
    """An image that is damaged, of an unknown kind, or too large to be honest."""

    exit_code = 63


class BadCaption(DataError):
    """A caption that is missing, empty or not UTF-8."""

    exit_code = 64


class WrongView(DataError):
    """Loader state or a folder belongs to another data set, seed or global batch."""

    exit_code = 65


class BadMember(DataError):
    """A tar member with a refused suffix, a refused name, or out of order."""

    exit_code = 66


class BadSplit(DataError):
    """Sizes that do not divide: world, global batch, lanes, too few samples."""

    exit_code = 67


class TooManyBad(DataError):
    """More substituted samples than `max_bad` allows."""

    exit_code = 68


class BadArray(DataError):
    """Latents or text embeddings that are not a plain finite array of the right shape."""

    exit_code = 69


class StoreTrouble(DataError):
    """An object store cannot be reached, refuses, or does not keep to its protocol, after all retries."""

    exit_code = 70


class BadStage(DataError):
    """A stage of the user's own failed on a sample, or gave something that is no sample."""

    exit_code = 72


class ChangedShard(DataError):
    """A shard was replaced in its store while it was read."""

    exit_code = 71


def why(error: OSError) -> str:
    """What a system call says, for messages; the limit of open files is said to be one."""
    words = error.strerror or type(error).__name__
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return f"{words} in this process or on this machine (the file itself may be well); raise the limit: ulimit -n"
    return words


SAMPLE_ERRORS = (TruncatedShard, CorruptShard, UndecodableImage, BadCaption, BadArray, BadStage)
"""Faults of one sample, which `on_bad="substitute"` may replace. The others concern a shard or the whole view."""

"""Errors a user can cause, each with its own exit code. `assert` is for our own mistakes.

Every message is one line per problem: what, where, the rule, and the nearest valid value where one exists.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass

from ecdit_train.secrets import hide_forms

EXIT_OK = 0
EXIT_REQUEUE = 75
"""Stopped on request with everything saved: run me again (matches Slurm's RequeueExit)."""


class EcditError(Exception):
    """Base of everything a user can cause; `exit_code` is what the process returns."""

    exit_code = 1
    everywhere = False
    """Whether every rank raises it alike, so that one of them may speak for all."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One broken rule of a configuration."""

    field: str
    value: object
    rule: str
    nearest: object | None = None

    def __str__(self) -> str:
        hint = f"; nearest valid: {self.nearest}" if self.nearest is not None else ""
        # What was typed may be a token in the wrong place, and a message ends up in logs.
        return hide_forms(f"{self.field} = {self.value!r}: {self.rule}{hint}")


class NoProgressError(EcditError):
    """Several lives of a job ended without a newer committed checkpoint: somebody must look."""

    exit_code = 76


class ConfigError(EcditError):
    """A configuration refused before anything started; lists every problem at once."""

    exit_code = 77
    everywhere = True

    def __init__(self, problems: Sequence[Problem] | Problem | str) -> None:
        if isinstance(problems, Problem):
            problems = [problems]
        self.problems: list[Problem] = [] if isinstance(problems, str) else list(problems)
        super().__init__(problems if isinstance(problems, str) else "\n".join(str(p) for p in self.problems))


class CheckpointError(EcditError):
    """A checkpoint that is damaged, incomplete or does not fit the model."""

    exit_code = 78
    everywhere = True


class RunFolderError(EcditError):
    """A run folder that is missing, or belongs to another configuration."""

    exit_code = 79
    everywhere = True


class NonFiniteError(EcditError):
    """The loss or the gradient norm was not finite; the update was not applied."""

    exit_code = 80
    everywhere = True


class EncoderError(EcditError):
    """A frozen encoder that cannot be loaded (no folder, no safetensors weights, wrong width)."""

    exit_code = 81


class RunOwnedError(EcditError):
    """Another job owns the run folder, or took it over from this one: this process may write nothing there."""

    exit_code = 85
    everywhere = True


class HangError(EcditError):
    """A rank was silent for longer than its phase may take (`watch`); the message names rank and phase."""

    exit_code = 86
    everywhere = True


class StorageError(EcditError):
    """The disk is full, read-only or gone where the run cannot go on without it."""

    exit_code = 87
    everywhere = True


def of_disk(error: OSError) -> Exception:
    """What a full or read-only disk said, as StorageError; anything else as it is."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
        return error
    where = f"{error.filename}: " if error.filename else ""
    return StorageError(f"{where}{error.strerror}; make room and run the same command again: what is finished is kept")


class RendezvousError(EcditError):
    """The ranks did not find each other: the port is taken, the host has no address, or not all of them came."""

    exit_code = 88


class CorruptionError(EcditError):
    """A rank's copy of a parameter is not what the others hold; the message names the rank."""

    exit_code = 89
    everywhere = True


class UnfitError(EcditError):
    """The machine, the cluster or the run cannot work as asked: `ecdit doctor` has said what, and how to mend it."""

    exit_code = 90


class OutOfMemoryError(EcditError):
    """A GPU's memory, or the host's, was full: the message says where, and what takes less."""

    exit_code = 91


class PeerLostError(EcditError):
    """Another rank left in the middle of an exchange; its own message says why."""

    exit_code = 84


class PeerRefusedError(EcditError):
    """Another rank could not start and has said why; carries that rank's exit code. Never shown."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"another rank refused with exit code {exit_code}")
        self.exit_code = exit_code

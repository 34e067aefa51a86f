"""The few file operations a checkpoint needs, each as strict as the contract: no symlinks, no overwrites, no short I/O.

Order on disk is what makes a commit a commit: file data is fsynced before the folder that names it, and a folder
before the rename that publishes it. `tests/unit/checkpoint/test_checkpoint_crash.py` kills and un-syncs at every operation.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from ecdit_train.checkpoint.failures import CheckpointDamagedError


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[int]:
    """A descriptor of a file that did not exist; fsynced on success. Raises FileExistsError, OSError (ENOSPC ...)."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        yield descriptor
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, *, data: bytes | memoryview) -> None:
    """Write every byte; one write call may take fewer than it was given."""
    view = memoryview(data).cast("B")
    while view:
        view = view[os.write(descriptor, view) :]


@contextlib.contextmanager
def sound_file(path: Path, *, nbytes: int, holds: str) -> Iterator[int]:
    """A read descriptor of a regular file of exactly `nbytes`.

    Raises CheckpointDamagedError naming the file and what it `holds`. Errors that say nothing about the file (access
    denied, too many open files) stay OSError: they are no reason to fall back to an older checkpoint.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.EIO, errno.ENOTDIR):
            what = "is a symbolic link" if error.errno == errno.ELOOP else f"cannot be opened ({error.strerror})"
            raise CheckpointDamagedError(f"{path.parent.name}/{path.name} {what}; it holds {holds}") from error
        raise
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size != nbytes:
            raise CheckpointDamagedError(
                f"{path.parent.name}/{path.name} has {status.st_size} bytes, it should have {nbytes}; it holds {holds}"
            )
        yield descriptor
    finally:
        os.close(descriptor)


def read_at(descriptor: int, *, offset: int, nbytes: int) -> bytearray:
    """Exactly `nbytes` from `offset`. Raises CheckpointDamagedError on end of file or a medium error."""
    data = bytearray(nbytes)
    view = memoryview(data)
    done = 0
    while done < nbytes:
        try:
            count = os.preadv(descriptor, [view[done:]], offset + done)
        except OSError as error:
            if error.errno == errno.EIO:
                raise CheckpointDamagedError(f"medium error at byte {offset + done}") from error
            raise
        if count == 0:
            raise CheckpointDamagedError(f"file ends at byte {offset + done}")
        done += count
    return data


def sync_folder(path: Path) -> None:
    """Make the names in `path` durable. File systems without folder fsync are taken at their word."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def rename_new(source: Path, *, target: Path) -> None:
    """Rename a folder to a name that is free, and make it durable. Raises FileExistsError."""
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, "already exists", str(target))
    os.rename(source, target)  # onto a non-empty folder the kernel refuses too, so a racing commit cannot be replaced
    sync_folder(target.parent)


def remove_tree(path: Path) -> None:
    """Delete a folder of ours as far as it lets itself be deleted; a rest is cleaned at the next start."""
    shutil.rmtree(path, ignore_errors=True)

"""What becomes of a job after a life with this exit code: a table. What is not in it may have been bad luck, and is tried again."""

from __future__ import annotations

from dataclasses import dataclass

from ecdit_train import errors

DONE, SAVED, STOP, AGAIN = "done", "saved", "stop", "again"


@dataclass(frozen=True, kw_only=True)
class ExitClass:
    """One row."""

    then: str
    """`done`; `saved`: stopped on request with everything saved; `stop`: somebody must look; `again`."""
    reason: str


TABLE: dict[int, ExitClass] = {
    errors.EXIT_OK: ExitClass(then=DONE, reason="the run is finished"),
    errors.EXIT_REQUEUE: ExitClass(then=SAVED, reason="saved and stopped on request"),
    2: ExitClass(then=STOP, reason="the command line of the ranks cannot be read"),
    **{code: ExitClass(then=STOP, reason="the data cannot be used as they are") for code in range(60, 75)},
    70: ExitClass(then=AGAIN, reason="an object store did not answer"),
    errors.NoProgressError.exit_code: ExitClass(then=STOP, reason="no progress over several lives"),
    errors.ConfigError.exit_code: ExitClass(then=STOP, reason="the configuration is refused"),
    errors.CheckpointError.exit_code: ExitClass(then=STOP, reason="no checkpoint can be used"),
    errors.RunFolderError.exit_code: ExitClass(then=STOP, reason="the run folder is missing or another run's"),
    errors.NonFiniteError.exit_code: ExitClass(then=STOP, reason="loss or gradient is not finite"),
    errors.EncoderError.exit_code: ExitClass(then=STOP, reason="an encoder cannot be loaded"),
    errors.RunOwnedError.exit_code: ExitClass(then=STOP, reason="another job owns the run folder"),
    errors.StorageError.exit_code: ExitClass(then=STOP, reason="the disk is full, read-only or gone"),
    errors.CorruptionError.exit_code: ExitClass(then=STOP, reason="a rank's copy of a parameter differs"),
    errors.PeerLostError.exit_code: ExitClass(then=AGAIN, reason="a rank was lost"),
    errors.OutOfMemoryError.exit_code: ExitClass(then=AGAIN, reason="a GPU's or a host's memory was full"),
    errors.HangError.exit_code: ExitClass(then=AGAIN, reason="a rank hung"),
    errors.RendezvousError.exit_code: ExitClass(then=AGAIN, reason="the ranks did not find each other"),
}


def of(code: int) -> ExitClass:
    """The row of an exit code; 128 + N is the end by signal N."""
    if code in TABLE:
        return TABLE[code]
    return ExitClass(then=AGAIN, reason="a process was killed" if code > 128 else "an error of unknown kind")

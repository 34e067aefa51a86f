"""How a process beside Slurm's batch shell begins and ends."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ecdit_train.errors import EcditError
from launch.outside import WARNINGS, Outside


def serve(argv: Sequence[str], *, module: str, work: Callable[[Path, Outside], int]) -> int:
    """The exit code of `work` on the job file that the command line names; an EcditError is lines on stderr and its code."""
    outside = Outside()
    outside.open_ears()
    if len(argv) != 1:
        print(f"usage: python -m {module} RUN/job.json", file=sys.stderr)
        return 2
    try:
        return work(Path(argv[0]), outside)
    except EcditError as error:
        for line in str(error).splitlines():
            print(f"ecdit: {type(error).__name__}: {line}", file=sys.stderr)
        return error.exit_code
    finally:  # Slurm ends what it has requeued; an interpreter that is leaving has no handlers any more
        signal.pthread_sigmask(signal.SIG_BLOCK, WARNINGS)

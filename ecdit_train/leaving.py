"""How the program ends: with what its verb decided, whatever happens while the interpreter is taken apart.

A daemon thread that is inside of a C++ library at that moment (a tracker's, given up after its time; a prefetcher's) is ended by
force when it asks for the interpreter, and C++ answers with `terminate called without an active exception`: a signal, of a rank
whose work is done and saved, which a launcher must take for a lost one. So after the hooks of `atexit`, which close what is open
while threads still run, the process ends at once. Hooks that were there before it began to run (`logging`'s own is called; those
of an interpreter's site are not) go without their turn.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys
from collections.abc import Callable

UNWRITTEN = 120
"""Python's own exit code where its last words could not be written."""


def as_decided(main: Callable[[], None]) -> None:
    """Run `main` as the whole of a process. What it ends with is the exit code: SystemExit's, else 1 after a traceback."""
    decided: list[int] = []

    def end() -> None:
        if not decided:  # a signal's end, KeyboardInterrupt among them, is Python's affair
            return
        with contextlib.suppress(Exception):
            logging.shutdown()
        with contextlib.suppress(AttributeError, OSError, ValueError):
            sys.stderr.flush()
        try:
            sys.stdout.flush()
        except (AttributeError, ValueError):  # closed, or never there
            pass
        except OSError:
            decided[0] = decided[0] or UNWRITTEN
        os._exit(decided[0])

    atexit.register(end)  # the first to come is the last to be called
    try:
        main()
    except SystemExit as wish:
        decided.append(wish.code if isinstance(wish.code, int) else int(wish.code is not None))
        raise
    except Exception:
        decided.append(1)
        raise

"""How the program ends: with what its verb decided, whatever happens while the interpreter is taken apart.

A daemon thread that is inside of a C++ library at that moment (a tracker's, given up after its time; a prefetcher's) is
ended by force when it asks for the interpreter, and C++ answers with `terminate called without an active exception`: a
signal, of a rank whose work is done and saved, which a launcher must take for a lost one. So after the hooks of
`atexit`, which close what is open and while which threads still run, the process ends at once.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from collections.abc import Callable


def as_decided(main: Callable[[], None]) -> None:
    """Run `main` as the whole of a process. What ends with SystemExit ends with its code; any other exception goes Python's way."""
    decided: list[int] = []

    def end() -> None:
        if decided:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(AttributeError, OSError, ValueError):
                    stream.flush()
            os._exit(decided[0])

    atexit.register(end)  # the first to come is the last to be called
    try:
        main()
    except SystemExit as wish:
        if wish.code is None or isinstance(wish.code, int):
            decided.append(wish.code or 0)
        raise

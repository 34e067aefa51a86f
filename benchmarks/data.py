"""All benchmarks of the data pipeline and their bars in one table: `make bench-data` (about fifteen minutes, alone on the machine).

Each part writes its dated JSON under benchmarks/results/. Exit code 1 if a bar is missed or a part fails.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable

from benchmarks import data_paths, data_peers, data_setup, data_state, data_store
from benchmarks.timing import read_bars

PARTS: dict[str, Callable[[list[str]], int]] = {
    "data_peers": data_peers.main,
    "data_paths": data_paths.main,
    "data_setup": data_setup.main,
    "data_store": data_store.main,
    "data_state": data_state.main,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--energon", metavar="PYTHON", help="an interpreter with megatron-energon")
    parser.add_argument("--only", nargs="+", choices=tuple(PARTS), default=tuple(PARTS), metavar="PART")
    args = parser.parse_args(argv)
    codes: dict[str, int] = {}
    for name in args.only:
        print(f"--- {name}", flush=True)
        words = ["--energon", args.energon] if args.energon and name == "data_peers" else []
        try:
            codes[name] = PARTS[name](words)
        except Exception:  # the others are measured all the same
            traceback.print_exc()
            codes[name] = 2
    print("\n--- all of them")
    for name, code in codes.items():
        if code == 2:
            print(f"FAIL  {name}: ended with an error")
        else:
            print(*read_bars(name), sep="\n")
    return int(any(codes.values()))


if __name__ == "__main__":
    sys.exit(main())

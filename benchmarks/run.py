"""The benchmarks of layer, block, step, sampling and spreading, one after the other: `python -m benchmarks.run`.

Each stops beginning rounds when its share of five minutes is over; on a slow CPU that leaves three rounds of each. What was
left out (E of 8, 32 and 64, bf16 where the CPU has no instructions for it) is said. Exit code 1 if a bar is missed.
"""

from __future__ import annotations

import sys

from . import block, moe_layer, parallel_overhead, sampling, step

SECONDS = {moe_layer: 50, block: 15, step: 45, sampling: 30}


def main() -> int:
    codes = []
    for module, seconds in SECONDS.items():
        print(f"--- {module.__name__}")
        codes.append(module.main(["--seconds", str(seconds)]))
    print(f"--- {parallel_overhead.__name__}")
    codes.append(parallel_overhead.main(["--rounds", "4"]))
    print("left out: E = 8, 32 and 64 (python -m benchmarks.moe_layer --experts 8,16,32,64)")
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())

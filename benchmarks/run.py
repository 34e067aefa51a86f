"""All benchmarks, one after the other: `python -m benchmarks.run` (about four minutes). Exit code 1 if a bar is missed."""

from __future__ import annotations

import sys

from . import block, moe_layer, parallel_overhead


def main() -> int:
    codes = []
    for module in (moe_layer, block, parallel_overhead):
        print(f"--- {module.__name__}")
        codes.append(module.main([]))
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())

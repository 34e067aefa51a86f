"""How many bytes a second an all-reduce moves: `python -m ecdit_train.parallel.bandwidth`, as ranks of a launcher. For the checks
before a life; rank 0 prints one line.

The figure is the bus bandwidth of NCCL's tests, 2 (n - 1) / n bytes moved for each byte reduced, so it does not depend on n.
"""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from ecdit_train.parallel import runtime

MARK = "ecdit-bandwidth "
GPU_BYTES, CPU_BYTES = 256 << 20, 8 << 20
ROUNDS = 5
MEET_SECONDS = 120.0


def measure(device: str) -> float:
    """Bytes/s, the best of some rounds; the first ones set connections up. Collective."""
    here = runtime.start(device, meet_within=MEET_SECONDS, wait_within=MEET_SECONDS)
    try:
        num_bytes = GPU_BYTES if device == "cuda" else CPU_BYTES
        values = torch.zeros(num_bytes // 4, device=here.device)
        best = float("inf")
        for number in range(2 + ROUNDS):
            here.barrier()
            began = time.monotonic()
            dist.all_reduce(values)
            if device == "cuda":
                torch.cuda.synchronize()
            if number >= 2:
                best = min(best, time.monotonic() - began)
        return 2 * (here.world - 1) / here.world * num_bytes / best
    finally:
        here.shutdown()


def main() -> None:
    import os

    found = measure("cuda" if torch.cuda.is_available() else "cpu")
    if os.environ.get("RANK") == "0":
        print(f"{MARK}{found:.6g}", flush=True)


if __name__ == "__main__":
    main()

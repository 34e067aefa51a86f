"""Several ranks on this machine, from inside a test: `run_distributed(world, fn, *args)`.

Ranks are forked from one server process that has imported torch, Megatron and DeepSpeed once (seconds each, times
ranks, times tests otherwise). They meet at a store which the test process holds at a port the system chose, so no
port can be taken by another; every run has a deadline, and a failing rank ends it at once.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PRELOAD = ["dist_preload"]


class RankError(AssertionError):
    """A rank raised; the message is its traceback."""


def run_distributed(world: int, fn: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
    """`fn(runtime, *args)` on `world` gloo ranks; their return values in rank order. `fn` must
    be importable by name."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    # The server ignores our sys.path (a Python 3.11 bug) and then skips what it cannot preload, without a word.
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    os.environ["PYTHONPATH"] = os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")])
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes, pipes = [], []
    for rank in range(world):
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(rank, world, store.port, send, fn, args), daemon=True)
        process.start()
        send.close()
        processes.append(process)
        pipes.append(receive)
    failed = True
    try:
        results = _collect(pipes, deadline=time.monotonic() + timeout)
        failed = False
        return results
    finally:
        for process in processes:
            if not failed:
                process.join(timeout=10)
            if process.is_alive():
                process.kill()
            process.join()


def _collect(pipes: list[Any], *, deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    rank_of = {pipe: rank for rank, pipe in enumerate(pipes)}
    while len(results) < len(pipes):
        waiting = [pipe for pipe in pipes if rank_of[pipe] not in results]
        ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankError(f"ranks {sorted(rank_of[p] for p in waiting)} did not finish in time")
        for pipe in ready:
            try:
                ok, value = pipe.recv()
            except EOFError:
                ok, value = False, "died without a word"
            if not ok:
                raise RankError(f"rank {rank_of[pipe]}:\n{value}")
            results[rank_of[pipe]] = value
    return [results[rank] for rank in range(len(pipes))]


def _rank(rank: int, world: int, port: int, send: Any, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    from ecdit_train.parallel import runtime as runtimes

    torch.set_num_threads(1)
    env = {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    try:
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
        runtime = runtimes.start("cpu", env=env, store=store)
        value = fn(runtime, *args)
        runtime.barrier()
        send.send((True, value))
        runtime.shutdown()
    except BaseException:
        send.send((False, traceback.format_exc()))
    finally:
        send.close()
        os._exit(0)  # no atexit work of vendors, no waiting for their threads

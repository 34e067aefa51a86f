"""Whole lives of a run on forked ranks, one of which ends itself by SIGKILL at a named moment; and what such lives leave.

The moment is met in the rank itself, so it is exact. What a rank did is on disk before it dies: a line for every update.
"""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch.distributed as dist
from dist_harness import PRELOAD, _rank
from dist_runs import Layout, configure, digests

from ecdit_train.build import build_trainer
from ecdit_train.checkpoint.background import Saver
from ecdit_train.checkpoint.manager import CheckpointManager
from ecdit_train.errors import PeerLostError
from ecdit_train.parallel.runtime import is_peer_lost
from ecdit_train.supervise.beats import Heart
from ecdit_train.supervise.stop import StopRequest

STEPS = 96
RUN = (
    *("moe.num_experts=4", "train.microbatch=2", f"train.steps={STEPS}", "optim.schedule=constant"),
    *("checkpoint.every_steps=2", "checkpoint.keep=1", "watch.lease=10"),
    *("validation.images=8", "validation.every_steps=3", "observe.sample_every=4", "observe.prompts=[a red circle]"),
)
LAYOUTS = {
    "single": Layout(world=1),
    "dp2": Layout(world=2),
    "tp2": Layout(world=2, words=("parallel.tp=2",)),
    "ep2": Layout(world=2, words=("parallel.ep=2",)),
    "tp2_ep2": Layout(world=2, words=("parallel.tp=2", "parallel.ep=2")),
}
PHASES = ("data", "encode", "forward", "backward", "exchange", "optimizer", "validate", "log", "show", "save")
"""As the heart names them."""
EVERYWHERE = (*PHASES, "loaded", "write")
"""Met by every rank. `loaded`: a checkpoint was read (or there was none) and nothing is trained yet; `write`: in the middle of
its part of a save, before a sync or, beside the training, once the saver has it."""
FIRST_RANK = ("commit", "committed", "prune", "pruned")
"""Met by rank 0: before and after the rename that commits a step, and the one that takes a step out of the committed ones."""
STEP = re.compile(r"step_\d+")


@dataclass(frozen=True, kw_only=True)
class Kill:
    rank: int
    moment: str
    after: int
    """Updates of the life that must have begun before."""
    delay: float
    """Seconds between the moment and the signal."""


def kills(world: int, *, chains: int, each: int, seed: int = 0) -> list[list[Kill]]:
    """Every moment on every rank in turn, shuffled, dealt out to `chains` lists of `each`."""
    rng = random.Random(seed)
    grid = [(moment, rank) for moment in EVERYWHERE for rank in range(world)] + [(moment, 0) for moment in FIRST_RANK]
    dealt: list[tuple[str, int]] = []
    while len(dealt) < chains * each:
        rng.shuffle(grid)
        dealt += grid
    of = [
        Kill(rank=rank, moment=moment, after=rng.randrange(1, 5), delay=rng.choice((0.0, 0.0, 0.001, 0.01)))
        for moment, rank in dealt
    ]
    return [of[n * each : (n + 1) * each] for n in range(chains)]


# --- on a rank --------------------------------------------------------------------------------------------------------


class Mortal(Heart):
    """A heart that meets the moments."""

    def __init__(self, *, rank: int, kill: Kill | None) -> None:
        self.kill = kill if kill is not None and kill.rank == rank else None
        self.updates = 0
        super().__init__(None, rank=rank)

    def enter(self, phase: str, *, step: int | None = None) -> None:
        super().enter(phase, step=step)
        self.updates += phase == "data"
        self.meet(phase)

    def meet(self, moment: str) -> None:
        kill = self.kill
        if kill is None or kill.moment != moment or (moment != "loaded" and self.updates < kill.after):
            return
        if kill.delay == 0.0:
            os.kill(os.getpid(), signal.SIGKILL)
        threading.Timer(kill.delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
        self.kill = None


def arm(heart: Mortal) -> None:
    """Let calls of this process meet the moments that no phase begins with. The process ends with the life."""
    rename, fsync, start, copied, resume = os.rename, os.fsync, Saver.start, Saver.copied, CheckpointManager.resume

    def renamed(source: Any, target: Any, **more: Any) -> None:
        away = STEP.fullmatch(Path(os.fspath(source)).name)
        into = STEP.fullmatch(Path(os.fspath(target)).name)
        heart.meet("commit" if into else "prune" if away else "")
        rename(source, target, **more)
        heart.meet("committed" if into else "pruned" if away else "")

    def synced(descriptor: int) -> None:
        if heart.phase == "save" and "/checkpoints/" in os.readlink(f"/proc/self/fd/{descriptor}"):
            heart.meet("write")
        fsync(descriptor)

    def started(saver: Saver, *args: Any) -> None:
        start(saver, *args)
        heart.meet("write")

    def handed_over(saver: Saver) -> None:
        copying = saver._copying is not None
        copied(saver)
        heart.meet("write" if copying else "")

    def loaded(manager: CheckpointManager, *args: Any, **more: Any) -> Any:
        answer = resume(manager, *args, **more)
        heart.meet("loaded")
        return answer

    os.rename, os.fsync = renamed, synced
    Saver.start, Saver.copied, CheckpointManager.resume = started, handed_over, loaded  # type: ignore[method-assign]


def life(here: Any, run: Path, shards: Path, words: tuple[str, ...], kill: Kill | None, notes: Path) -> Any:
    """Start or resume the run and live until its end, or the kill's. Digests of all whole tensors at the end."""
    heart = Mortal(rank=here.rank, kill=kill)
    arm(heart)
    with StopRequest() as stop, notes.with_name(f"{notes.name}-{here.rank}.jsonl").open("w") as file:
        trainer = _together(lambda: build_trainer(configure(here, run, shards, *RUN, *words), here, heart=heart))
        made = trainer._made

        def noted(done: Any, numbers: Any, verdict: Any) -> None:
            line = [done.step, done.taken.batch.position_B.tolist(), float(numbers.loss), float(numbers.grad_norm)]
            file.write(json.dumps(line) + "\n")
            file.flush()
            made(done, numbers, verdict)

        trainer._made = noted  # type: ignore[method-assign]
        try:
            assert _together(lambda: trainer.run(stop))
        finally:
            trainer.close()
        return digests(trainer)


def _together(act: Callable[[], Any]) -> Any:
    try:
        return act()
    except Exception as error:
        if is_peer_lost(error):
            raise PeerLostError(str(error)) from None
        raise


# --- in the test ------------------------------------------------------------------------------------------------------


KILLED = "was killed"


def ranks(world: int, fn: Callable[..., Any], *args: Any, timeout: float) -> list[Any]:
    """As `run_distributed`, but every rank has its own end, in rank order: (True, value), (False, traceback), or KILLED.

    A rank that is lost must be noticed by the others themselves: nobody ends them before the time is over.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    folders = [str(Path(__file__).parents[1] / "dist"), str(Path(__file__).parents[2])]
    os.environ["PYTHONPATH"] = os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")])
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes, pipes = [], {}
    for rank in range(world):
        receive, send = context.Pipe(duplex=False)
        processes.append(context.Process(target=_rank, args=(rank, world, store.port, send, fn, args), daemon=True))
        processes[-1].start()
        send.close()
        pipes[receive] = rank
    ends: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    try:
        while len(ends) < world:
            left = [pipe for pipe, rank in pipes.items() if rank not in ends]
            ready = wait(left, timeout=max(0.0, deadline - time.monotonic()))
            assert ready, f"ranks {sorted(pipes[p] for p in left)} go on after {timeout:g} s; ended: {ends}"
            for pipe in ready:
                try:
                    ends[pipes[pipe]] = pipe.recv()
                except EOFError:
                    ends[pipes[pipe]] = KILLED
    finally:
        for process in processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
            process.join()
    return [ends[rank] for rank in range(world)]


def updates(notes: Path, rank: int) -> dict[int, list[Any]]:
    """By step: positions, loss and norm of each update that a rank made; a line that the kill cut is left out."""
    lines = notes.with_name(f"{notes.name}-{rank}.jsonl").read_text().split("\n")[:-1]
    return {step: rest for step, *rest in map(json.loads, lines)}

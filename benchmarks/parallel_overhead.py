"""What spreading costs: a step of fixed work on 2 ranks against 1, and the bytes that experts exchange against the plan.

    python -m benchmarks.parallel_overhead [--rounds 8]

One world of two gloo ranks holds every layout at once; in each round all of them and the plain single-process model train
on the same images, in shuffled order. The ratio is CPU seconds of both ranks together over CPU seconds of one process: 1.0
would be free. CPU time contains what a rank spends polling for its peer. The wall clock of two ranks on a shared machine
says little, so it is not reported. No GPU number is claimed.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import time
from dataclasses import replace
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from ecdit_train.config.compose import compose
from ecdit_train.config.schema import RunConfig
from ecdit_train.diffusion.microbatch import split
from ecdit_train.parallel import runtime
from ecdit_train.plan import estimate, to_json

from .timing import Bar, report, settle
from .training import Training, microbatch

LAYOUTS = {
    "dp 2": [],
    "tp 2": ["parallel.tp=2"],
    "ep 2": ["parallel.ep=2"],
    "tp 2, ep 2": ["parallel.tp=2", "parallel.ep=2"],
}
ONE = "one process"
STEPS = 3
"""Optimizer steps per turn."""


class Trained:
    """A model, its optimizer and this rank's share of a fixed batch; `turn` trains a few steps."""

    def __init__(self, config: RunConfig, here: runtime.Runtime) -> None:
        config = replace(config, optim=replace(config.optim, ema_decay=0.0))
        self.training = Training(config, here, lr=1e-4)
        mesh, images = self.training.parallel.mesh, config.train.global_batch
        batch = microbatch(config, images=images, generator=torch.Generator().manual_seed(0))
        mine = list(split(batch, size=images // mesh.dp_size))[mesh.dp_rank]
        self.micros = list(split(mine, size=config.train.microbatch))

    def turn(self, steps: int = STEPS) -> None:
        for _ in range(steps):
            self.training.step(self.micros)


class ExchangedBytes:
    """Counts what this process hands to all-to-all while it is open."""

    def __enter__(self) -> ExchangedBytes:
        self.bytes, self._real = 0, dist.all_to_all_single

        def counted(output: torch.Tensor, input: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.bytes += input.numel() * input.element_size()
            return self._real(output, input, *args, **kwargs)

        dist.all_to_all_single = counted
        return self

    def __exit__(self, *_: object) -> None:
        dist.all_to_all_single = self._real


def worker(rounds: int) -> None:
    """One of the two ranks; rank 0 also plays the single process, while rank 1 waits, and prints the result as JSON."""
    import json

    settle()
    here = runtime.start("cpu")
    base = compose(["experiment=shapes_tiny"])
    trained = {
        name: Trained(c, here)
        for name, c in ((n, compose(["experiment=shapes_tiny", *words])) for n, words in LAYOUTS.items())
    }
    if here.rank == 0:
        trained[ONE] = Trained(base, replace(here, world=1, control=None))
    seconds: dict[str, list[float]] = {name: [] for name in [*LAYOUTS, ONE]}
    order = [*LAYOUTS, ONE]
    shuffle = random.Random(0).shuffle
    for number in range(-1, rounds):
        shuffle(order)
        for name in order:
            here.barrier()
            began = time.process_time()
            if name in trained:
                trained[name].turn()
            spent = time.process_time() - began if name in trained else 0.0
            total = sum(here.all_gather_json(spent))
            if number >= 0:
                seconds[name].append(total)
    with ExchangedBytes() as counter:
        trained["ep 2"].turn(steps=1)
    if here.rank == 0:
        ratios = {n: median(a / b for a, b in zip(seconds[n], seconds[ONE], strict=True)) for n in LAYOUTS}
        print(json.dumps({"ratios": ratios, "exchanged": counter.bytes}), flush=True)
    here.shutdown()


def main(arguments: list[str] | None = None) -> int:
    import json
    import os

    from launch.local import free_port

    parser = argparse.ArgumentParser(
        prog="parallel_overhead", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.worker:
        worker(args.rounds)
        return 0
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.parallel_overhead", "--worker", "--rounds", str(args.rounds)]
    ranks = [
        subprocess.Popen(
            command, env=os.environ | place | {"RANK": str(r), "LOCAL_RANK": str(r)}, stdout=subprocess.PIPE, text=True
        )
        for r in range(2)
    ]
    said = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        return 1
    measured = json.loads(said[0].strip().splitlines()[-1])
    plan = to_json(estimate(compose(["experiment=shapes_tiny", "parallel.ep=2"]), world=2))
    planned = plan["traffic_per_step"]["all_to_all"]["message"]
    ratios: dict[str, Any] = {
        f"{name}: CPU of 2 ranks / 1 process": round(r, 3) for name, r in measured["ratios"].items()
    }
    ratios |= {"exchanged bytes per step and rank": measured["exchanged"], "planned": planned}
    for name, value in ratios.items():
        print(f"{name:<44} {value}")
    bars = [
        # Guards against a regression, not goals: a model this small spends its time on latency.
        *(
            Bar(
                name=f"{name}: CPU of 2 ranks / 1 process",
                value=ratio,
                limit=5.0 if "tp" in name else 3.0,
                at_least=False,
            )
            for name, ratio in measured["ratios"].items()
        ),
        Bar(name="exchanged bytes / plan", value=measured["exchanged"] / planned, limit=1.1, at_least=False),
        Bar(name="plan / exchanged bytes", value=planned / measured["exchanged"], limit=1.1, at_least=False),
    ]
    settings = {
        "experiment": "shapes_tiny",
        "global_batch": 128,
        "steps_per_turn": STEPS,
        "rounds": args.rounds,
        "threads_per_rank": 1,
    }
    return report("parallel_overhead", settings=settings, ratios=ratios, bars=bars)


if __name__ == "__main__":
    sys.exit(main())

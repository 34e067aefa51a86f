"""What watching a run costs a step: `python -m benchmarks.observe_cost` (two minutes; no quiet machine needed).

What is watched is timed by itself and held against the step that it belongs to, in the same round: a step with and one
without it differ by less than two equal steps do. Every step adds up its losses by timestep; one that a record follows
also counts the routing of all its microbatches, reads it back and makes numbers of it. A run pays the first at every
step and the second at every `observe.log_every`-th.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial

import torch

from benchmarks.timing import Bar, Work, interleave, report, settle
from benchmarks.training import Training, global_batch
from ecdit_train.config.compose import compose
from ecdit_train.config.schema import RunConfig
from ecdit_train.observe.metrics import MetricWindow
from ecdit_train.parallel.runtime import alone
from ecdit_train.train.step import Seen
from ecdit_train.train.watching import Watching

REPEATS = 5
LIMIT = 0.01
"""Share of a step that watching may take."""
CASES = {
    "the demo": ("experiment=shapes_tiny",),
    "64 experts": (
        *("experiment=shapes_tiny", "model.layers=4", "model.width=256", "model.heads=4", "moe.num_experts=64"),
        *("data.resolution=64", "moe.group_size=1024", "train.microbatch=8", "train.global_batch=16"),
    ),
    "token choice": ("experiment=shapes_tiny", "moe=token_choice"),
}


def forms(config: RunConfig) -> dict[str, Work]:
    """A step of this run on random images, and what is watched of it, REPEATS times each."""
    c, training, micros = config, Training(config, alone(), lr=1e-6), global_batch(config)
    B, images = c.train.microbatch, c.train.global_batch
    window = MetricWindow(device="cpu", images_per_step=images, tokens_per_step=images * c.tokens_per_image)
    watching = Watching(c, window=window, routers=training.parallel.model.routers)
    unlogged, logged = c.observe.log_every + 1, c.observe.log_every
    flow, seen = training.flow, list[Seen]()
    P = c.model.patch**2 * c.encoders.image.channels
    patches_BKP = torch.randn(B, c.tokens_per_image, P, generator=torch.Generator().manual_seed(1))

    def every_step() -> None:
        for _ in range(REPEATS):
            for micro in seen:
                flow.errors(patches_BKP, x_BKP=patches_BKP, eps_BKP=patches_BKP, t_B=micro.t_B)
            watching.add(numbers, watching.see(unlogged, seen))

    def record() -> None:
        for _ in range(REPEATS):
            watching.add(numbers, watching.see(logged, seen))
            window.flush(reading=partial(watching.read, logged))

    numbers = training.step(micros, watch=seen.extend).numbers()
    return {"step": lambda: training.step(micros).numbers() and None, "every step": every_step, "record": record}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES))
    args = parser.parse_args(argv)
    settle()
    configs = {name: compose(list(CASES[name]), local=False) for name in args.only}
    times = interleave({name: forms(config) for name, config in configs.items()}, rounds=args.rounds)
    ratios, bars = {}, []
    for name, config in configs.items():
        of, every = times[name], config.observe.log_every
        each, record = (of.ratio(form, "step") / REPEATS for form in ("every step", "record"))
        share = each + record / every
        spread_ = {form: of.spread(form, "step") / REPEATS for form in ("every step", "record")}
        ratios[name] = {"every_step": each, "record": record, "log_every": every, "share": share, "spread": spread_}
        print(f"{name}: {each:.2%} of a step at every step, {record:.2%} at a record, one in {every}: {share:.3%}")
        bars.append(Bar(name=f"{name}: share of a step", value=share, limit=LIMIT, at_least=False))
    return report("observe_cost", settings={"rounds": args.rounds}, ratios=ratios, bars=bars)


if __name__ == "__main__":
    sys.exit(main())

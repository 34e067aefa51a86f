"""What watching a run costs a step: `python -m benchmarks.observe_cost` (two minutes; no quiet machine needed).

What is watched is timed by itself and held against the step that it belongs to, in the same round: a step with and one
without it differ by less than two equal steps do. Every step adds up its losses by timestep; one that a record follows
also counts the routing of all its microbatches, reads it back and makes numbers of it. A run pays the first at every
step and the second at every `observe.log_every`-th.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch

from benchmarks.timing import Bar, Work, interleave, report, settle
from ecdit_train.config.compose import compose
from ecdit_train.config.schema import RunConfig
from ecdit_train.diffusion.flow import Flow
from ecdit_train.diffusion.microbatch import Microbatch
from ecdit_train.observe.metrics import MetricWindow
from ecdit_train.parallel.context import spread
from ecdit_train.parallel.runtime import alone
from ecdit_train.train.device_guard import DeviceGuard
from ecdit_train.train.state import TrainState
from ecdit_train.train.step import Numbers, Seen, train_step
from ecdit_train.train.watching import Watching

REPEATS = 5
LIMIT = 0.01
"""Share of a step that watching may take."""
Look = Callable[[Sequence[Seen]], None]
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
    c, parallel = config, spread(config, alone())
    generator = torch.Generator().manual_seed(0)
    B, M = c.train.microbatch, c.train.global_batch // c.train.microbatch
    side, text = c.latent_side, c.encoders.text
    micros = [
        Microbatch(
            position_B=torch.arange(B) + n * B,
            latents_BCHW=torch.randn(B, c.encoders.image.channels, side, side, generator=generator),
            features_BLX=torch.randn(B, text.max_tokens, text.width, generator=generator),
            mask_BL=torch.ones(B, text.max_tokens, dtype=torch.bool),
        )
        for n in range(M)
    ]
    about = {"config": c.diffusion, "seed": 0, "patch": c.model.patch, "num_kept": c.tokens_per_image}
    state = TrainState.fresh(parallel.model, c.optim)
    window = MetricWindow(device="cpu", images_per_step=B * M, tokens_per_step=B * M * c.tokens_per_image)
    watching = Watching(c, window=window, routers=parallel.model.routers)
    once = {
        "parallel": parallel,
        "state": state,
        "guard": DeviceGuard(c.health),
        "lr": 1e-6,
        "max_norm": 1.0,
        "group_tokens": c.group_tokens,
    }
    unlogged, logged = c.observe.log_every + 1, c.observe.log_every
    flow, seen = Flow(**about), list[Seen]()
    P = c.model.patch**2 * c.encoders.image.channels
    patches_BKP = torch.randn(B, c.tokens_per_image, P, generator=generator)

    def step(look: Look = lambda seen: None) -> Numbers:
        return train_step(micros, flow=flow, watch=look, **once).numbers()

    def every_step() -> None:
        for _ in range(REPEATS):
            for micro in seen:
                flow.errors(patches_BKP, x_BKP=patches_BKP, eps_BKP=patches_BKP, t_B=micro.t_B)
            watching.add(numbers, watching.see(unlogged, seen))

    def record() -> None:
        for _ in range(REPEATS):
            watching.add(numbers, watching.see(logged, seen))
            window.flush(reading=partial(watching.read, logged))

    numbers = step(seen.extend)
    return {"step": lambda: step() and None, "every step": every_step, "record": record}


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
